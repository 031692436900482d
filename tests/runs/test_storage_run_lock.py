"""One process in a run directory: the lock, who holds it, and what frees it."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import train

import steploop
from steploop.errors import CheckpointWriteError, RunLockedError
from steploop.runs.directory_lock import Owner, run_lock, run_owner
from steploop.runs.logs.screens import QuietScreen
from steploop.runs.reading import read_run
from steploop.tools.cli import call

# The module alone, so that a process starts in milliseconds: importing torch takes seconds.
ALONE = f"""
import importlib.util, sys, types
package = types.ModuleType("steploop"); package.__path__ = [{str(Path(steploop.__file__).parent)!r}]
sys.modules["steploop"] = package
from pathlib import Path
from steploop.runs.directory_lock import run_lock, run_owner
from steploop.errors import RunLockedError
directory = Path(sys.argv[1])
"""
HOLD = (
    ALONE
    + """
with run_lock(directory) as owner:
    print("locked", flush=True)
    sys.stdin.read()
"""
)
TRY = (
    ALONE
    + """
import time
start = time.monotonic()
try:
    with run_lock(directory):
        print("won", flush=True)
        sys.stdin.read()
except RunLockedError as error:
    print("lost", error.exit_code, time.monotonic() - start < 1.0, error, flush=True)
"""
)


def start(program, directory):
    return subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    process.stdin.close()
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait(30) == 0
    return out


@pytest.fixture
def holder(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "locked\n"
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_process_is_refused_at_once_and_writes_nothing(tmp_path, holder):
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    second = start(TRY, tmp_path)
    out = finish(second)
    assert out.startswith("lost 6 True The run directory")
    owner = json.loads((tmp_path / "run.owner.json").read_text())
    assert (
        f"is in use by process {holder.pid} on {owner['host']}, since {owner['started']}. Wait for it to end"
        in out
    )
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_a_killed_owner_leaves_no_stale_lock(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run.owner.json").exists()
    assert run_owner(tmp_path) is None
    with run_lock(tmp_path) as owner:
        assert owner.pid == os.getpid()


def test_of_twenty_racing_starters_one_wins(tmp_path):
    racers = [start(TRY, tmp_path) for _ in range(20)]
    first = [process.stdout.readline() for process in racers]
    assert sum(line == "won\n" for line in first) == 1
    assert all(line.startswith("lost 6 True") for line in first if line != "won\n")
    for process in racers:
        finish(process)


def test_a_status_command_sees_the_owner_and_disturbs_nobody(tmp_path, holder):
    for _ in range(5):
        owner = run_owner(tmp_path)
        assert isinstance(owner, Owner)
        assert owner.pid == holder.pid
    assert "lost" in finish(start(TRY, tmp_path))


def test_looking_does_not_make_a_starter_fail(tmp_path):
    """A look takes the lock for a moment; a starter that meets it tries again."""
    (tmp_path / "run.lock").touch()
    looker = start(
        ALONE
        + "\nprint(1, flush=True)\nimport time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: run_owner(directory)",
        tmp_path,
    )
    assert looker.stdout.readline() == "1\n"
    for _ in range(20):
        with run_lock(tmp_path):
            time.sleep(0.001)
    looker.kill()
    looker.wait()
    looker.stdin.close()
    looker.stdout.close()


def test_the_same_process_cannot_lock_twice_and_does_not_lose_the_lock_by_trying(tmp_path):
    """Opening and closing the file again would drop the lock."""
    (tmp_path / "link").symlink_to(tmp_path)
    with run_lock(tmp_path) as owner:
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(RunLockedError, match=f"in use by process {os.getpid()} "), run_lock(path):
                pass
            assert run_owner(path) == owner
        assert "lost" in finish(start(TRY, tmp_path))
    assert run_owner(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "run.lock"]


def test_a_child_that_lives_on_does_not_keep_the_lock(tmp_path):
    """A forked data worker inherits the descriptor, and would keep an flock."""
    program = (
        ALONE
        + """
import os, time
context = run_lock(directory)
context.__enter__()
if os.fork() == 0:
    time.sleep(30)
    os._exit(0)
print(os.getpid(), flush=True)
os._exit(0)
"""
    )
    process = start(program, tmp_path)
    process.stdout.readline()
    process.wait()
    with run_lock(tmp_path):
        pass
    process.stdin.close()
    process.stdout.close()


def test_leaving_the_block_frees_the_lock_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path):
        raise ZeroDivisionError
    with run_lock(tmp_path):
        pass


def test_a_directory_that_was_never_locked_has_no_owner(tmp_path):
    assert run_owner(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff"])
def test_an_owner_that_has_not_said_who_it_is_is_unknown(tmp_path, holder, content):
    (tmp_path / "run.owner.json").write_bytes(content)
    assert run_owner(tmp_path) == Owner(0, "an unknown host", "an unknown time")


def test_a_directory_that_cannot_hold_a_lock_is_told(tmp_path):
    (tmp_path / "run.lock").mkdir()
    with (
        pytest.raises(
            CheckpointWriteError, match=r"The run directory .* cannot be locked: Is a directory"
        ) as e,
        run_lock(tmp_path),
    ):
        pass
    assert e.value.errno is not None


def test_no_other_module_opens_the_lock_file():
    """A second open and close anywhere in the process would drop the lock; to ask whether it exists does no harm."""
    for path in Path(steploop.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and any(
                isinstance(n, ast.Constant) and n.value == "run.lock" for n in ast.walk(node)
            ):
                assert isinstance(node.func, ast.Attribute), path
                assert node.func.attr == "exists", path


_watched = []
sys.addaudithook(
    lambda event, arguments: [seen.append(str(arguments[0])) for seen in _watched if event == "open"]
)


class Looking(QuietScreen):
    """Whoever looks at the run from its own process, as a notebook does."""

    def __init__(self, out):
        self.out = out

    def train(self, line, *, done, left_s):
        if line["attempted"] == 3:
            for words in (
                ["status", str(self.out)],
                ["runs", str(self.out.parent)],
                ["inspect", str(self.out)],
            ):
                assert call(words) == 0
            assert read_run(self.out).state == "running"


def test_a_run_opens_its_lock_file_once_whoever_looks_at_it_meanwhile(tmp_path, capsys):
    out, opened = tmp_path / "run", []
    _watched.append(opened)
    try:
        train(out, {"epochs": "1"}, screen=Looking(out), checkpoint_every=1)
    finally:
        _watched.clear()
    assert "running" in capsys.readouterr().out
    assert opened.count(str(out / "run.lock")) == 1
