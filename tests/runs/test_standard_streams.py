"""A run outlives its output: a reader that went away, a full disk, a closed terminal or descriptor."""

import errno
import io
import json
import os
import pty
import sys
import warnings

import pytest
from running import POINTS

from steploop.runs.standard_streams import lasting_streams, settle_streams, watched_streams
from steploop.tools.cli import main

QUICK = ["--no-tune", "--device", "cpu", "--log-every", "1", "--epochs", "1"]


class Broken(io.StringIO):
    """A stream that fails from its n-th write on."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


FAILURES = [
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EBADF, "Bad file descriptor"),
    ValueError("I/O operation on closed file."),
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_inside_a_run_nobody_who_prints_notices_that_stdout_is_gone(failure, monkeypatch):
    out, err = Broken(failure, after=1), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_streams():
        sys.stdout.write("seen\n")
        for _ in range(3):
            sys.stdout.write("lost\n")
            sys.stdout.flush()
    assert sys.stdout is out
    assert out.getvalue() == "seen\n"
    reason = getattr(failure, "strerror", None) or str(failure)
    assert err.getvalue() == f"steploop: stdout cannot be written: {reason}. The run goes on without it.\n"


@pytest.mark.parametrize(("failure", "code"), [*zip(FAILURES, [1, 4, 4, 4, 4], strict=True)], ids=str)
def test_a_command_whose_output_is_its_result_ends_with_a_sentence(failure, code, monkeypatch):
    """Or without one where a reader such as head has seen enough."""
    monkeypatch.setattr(sys, "stdout", Broken(failure))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as ended, watched_streams():
        sys.stdout.write("lost\n")
    assert ended.value.code == code
    assert sys.stderr.getvalue().count("stdout cannot be written") == (code == 4)


def test_a_stream_that_is_closed_or_missing_is_no_terminal_and_takes_what_is_written(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", stream)
        if stream is not None:
            stream.close()
        with lasting_streams():
            assert not sys.stdout.isatty()
            sys.stdout.writelines(["a", "b"])
            sys.stdout.flush()


def test_a_character_that_the_stream_cannot_show_is_spelled_out(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with lasting_streams():
        sys.stdout.write("━ é\n")
    assert raw.getvalue() == b"\\u2501 \\xe9\n"


def in_child(tmp_path, arguments, prepare):
    """``steploop ...`` as its own process would run it, in a fork; ``prepare`` changes its descriptors.

    Returns:
        The exit code, and what it wrote to stderr.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: fork in a process with threads
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
            prepare()
            sys.stdout, sys.stderr = _opened(1), _opened(2)
            sys.argv = ["steploop", *arguments]
            main()
        except SystemExit as ended:
            code = ended.code
        finally:
            settle_streams()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, (tmp_path / "stderr").read_text()


def _opened(fd):
    """What Python makes of a descriptor at its start."""
    try:
        os.fstat(fd)
    except OSError:
        return None
    return os.fdopen(fd, "w")


def _to_a_pipe_without_reader():
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)


def _to_a_terminal_that_is_gone():
    master, terminal = pty.openpty()
    os.dup2(terminal, 1)
    os.close(master)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_to_a_pipe_without_reader, "Broken pipe"),
        (lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1), "No space left on device"),
        (_to_a_terminal_that_is_gone, "Input/output error"),
        (lambda: os.closerange(0, 3), None),
    ],
    ids=["reader gone", "full disk", "terminal gone", "all closed"],
)
def test_a_run_whose_output_is_lost_ends_as_it_would_have(prepare, said, tmp_path):
    """A run that is saved and finished, with the exit code of its training; its own prints are lost in the same way."""
    out = tmp_path / "run"
    code, err = in_child(tmp_path, ["run", POINTS, "--out", str(out), *QUICK], prepare)
    assert code == 0, err
    assert "Traceback" not in err
    assert err.count("\n") == (said is not None)
    assert said is None or f"steploop: stdout cannot be written: {said}. The run goes on without it." in err
    status = json.loads((out / "status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("finished", 0)


def test_a_status_that_cannot_be_printed_is_a_sentence_and_a_code(tmp_path):
    full = lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1)  # noqa: E731
    code, err = in_child(tmp_path, ["recipes"], full)
    assert (code, err) == (4, "steploop: stdout cannot be written: No space left on device.\n")
    (tmp_path / "stderr").unlink()
    code, err = in_child(tmp_path, ["recipes"], _to_a_pipe_without_reader)
    assert (code, err) == (1, "")
