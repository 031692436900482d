"""Runs for the tests: in this process, stopped at a chosen moment, or in a forked one that can be sent signals."""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path

from steploop.runs.conduct import carry_out
from steploop.runs.logs.screens import QuietScreen
from steploop.runs.requests import make_request, resume_request
from steploop.runs.signals import StopFlag
from steploop.tools.cli import call

POINTS = str(Path(__file__).with_name("points_recipe.py"))
_SAY_WHERE = signal.SIGRTMIN  # no signal of a run: where a child is that does not end
CHANGES = {}  # what the recipe files of ``changed`` do to the points


def changed(folder, change):
    """A recipe file: the points, with ``change(recipe, config)`` made of it; for this process and its forks."""
    name = f"change_{len(CHANGES)}"
    CHANGES[name] = change
    path = Path(folder) / f"{name}.py"
    path.write_text(
        "import points_recipe\nimport running\nfrom points_recipe import Config\n\n\n"
        "def build(config, device):\n"
        f"    return running.CHANGES[{name!r}](points_recipe.build(config, device), config)\n"
    )
    return str(path)


class StopAt(QuietScreen):
    """Sets a flag at the log point of an attempted step, as a signal during that step does."""

    def __init__(self, attempted, flag):
        self.attempted, self.flag = attempted, flag

    def train(self, line, *, done, left_s):
        if line["attempted"] == self.attempted:
            self.flag.handle(signal.SIGTERM)


class StopAtCheck(StopFlag):
    """Set by the n-th question whether to stop: in the middle of an evaluation."""

    def __init__(self, n):
        super().__init__()
        object.__setattr__(self, "left", n)

    __slots__ = ("left",)

    def check(self):
        if self.interruptible:
            self.left -= 1
            if self.left == 0:
                self.handle(signal.SIGTERM)
        super().check()


def wait_until(happened, timeout_s=60):
    """Look about a hundred times a second whether it has happened; it must within ``timeout_s``."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def train(
    out,
    values=None,
    *,
    resume=False,
    stop_at=None,
    flag=None,
    recipe=POINTS,
    screen=None,
    loggers=(),
    **options,
):
    """Train or go on in this process; the summary. Logs every step unless told otherwise."""
    options = {"log_every": 1, "tune": False, "device": "cpu", **options}
    if resume:
        request = resume_request(out, None, values or {}, **options)
    else:
        request = make_request(recipe, values or {}, out=out, **options)
    flag = flag or StopFlag()
    screen = screen or (QuietScreen() if stop_at is None else StopAt(stop_at, flag))
    return carry_out(request, screen, flag, loggers)


def digest(out, phase=""):
    """The digests of the newest checkpoint: (of the whole state, of the model)."""
    newest = max((Path(out) / f"checkpoints{phase}").glob("step-*"))
    manifest = json.loads((newest / "state.json").read_bytes())
    return (newest / "state.json").read_bytes(), manifest["files"]["model.safetensors"]


def steps(out):
    """The steps that have a checkpoint; none while there is no directory."""
    return sorted(int(path.name[5:]) for path in (Path(out) / "checkpoints").glob("step-*"))


def kept(out):
    """Step -> digest of every checkpoint that is there."""
    found = (Path(out) / "checkpoints").glob("step-*")
    return {int(path.name[5:]): json.loads((path / "state.json").read_bytes())["sha256"] for path in found}


def hidden(out):
    """What is being written, replaced or deleted among the checkpoints, or was found damaged."""
    return sorted(path.name for path in (Path(out) / "checkpoints").iterdir() if path.name.startswith("."))


def running(pid):
    """Whether a process of that number runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines(out):
    """What metrics.jsonl holds."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_bytes().splitlines()]


class Forked:
    """``steploop ...`` in a child of this interpreter, which spares it the import of torch; its own process group.

    ``inside`` is a context that the child is in.
    """

    def __init__(self, folder, *arguments, inside=None):
        self.out, self.err = Path(folder) / "stdout", Path(folder) / "stderr"
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # newer Pythons: fork in a process with threads
            self.pid = os.fork()
        if self.pid:
            return
        gc.freeze()  # what is collected in the child may wait for a thread that only its parent has
        code = 1
        try:
            os.setpgid(0, 0)
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            faulthandler.register(_SAY_WHERE, file=sys.stderr)
            with inside or nullcontext():
                code = call(list(arguments))
        except BaseException:  # noqa: BLE001  (a child must not go on as another pytest)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait_for(self, happened, timeout_s=300):
        """Wait until ``happened()`` is true; the child must not end before."""
        end = time.monotonic() + timeout_s
        while not happened():
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            assert ended == 0, f"it ended with {os.waitstatus_to_exitcode(status)}: {self.err.read_text()}"
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.01)

    def said(self):
        """Its output so far."""
        return self.out.read_text() if self.out.exists() else ""

    def kill(self):
        """End it and its workers, whatever they do."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def end(self, timeout_s=600):
        """(exit code, stdout, stderr) once it has ended; of one that a signal killed, minus its number."""
        end = time.monotonic() + timeout_s
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(self.pid, _SAY_WHERE)
                time.sleep(1.0)
                self.kill()
                raise AssertionError(f"it did not end: {self.err.read_text()}")
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(ended[1]), self.out.read_text(), self.err.read_text()
