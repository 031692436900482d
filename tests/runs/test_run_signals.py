"""Signals: the step in hand is finished, a checkpoint written, the way on said, nobody left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest
from points_recipe import Points
from running import POINTS, Forked, changed, digest, hidden, lines, running, steps, train, wait_until

from steploop.checkpoint.storage.local import LocalFs
from steploop.runs.directory_lock import run_owner

SLOW = ["--no-tune", "--device", "cpu", "--log-every", "1"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "run"
    train(out)
    return out


@pytest.fixture
def fork():
    """Start ``steploop ...`` with its output in a folder; nothing of it outlives the test."""
    children = []

    def forked(folder, *arguments):
        children.append(Forked(folder, *arguments))
        return children[-1]

    yield forked
    for child in children:
        child.kill()


@pytest.fixture
def start(fork, tmp_path):
    """Start a run of the points in ``tmp_path / "run"``."""
    return lambda *arguments: fork(tmp_path, "run", POINTS, "--out", str(tmp_path / "run"), *SLOW, *arguments)


def logged(tmp_path, kind="train", count=2):
    def happened():
        path = tmp_path / "run" / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(f'"kind": "{kind}"'.encode()) >= count

    return happened


def check_end(tmp_path, child, code, golden):
    ended, out, err = child.end()
    assert ended == code, err
    last = json.loads(out.splitlines()[-1])
    assert (last["state"], last["exit_code"]) == ("interrupted", code)
    assert last["resume"] == f"steploop resume {tmp_path / 'run'}"
    assert f"Go on with: {last['resume']}" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "status.json").read_bytes())["state"] == "interrupted"
    train(tmp_path / "run", {"step_s": 0.0, "eval_s": 0.0, "data_s": 0.0, "workers": 0}, resume=True)
    assert digest(tmp_path / "run") == digest(golden)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)],
)
def test_a_signal_in_a_step_saves_and_says_how_to_go_on(start, signum, code, golden, tmp_path):
    child = start("--set", "step_s=0.3")
    child.wait_for(logged(tmp_path))
    os.kill(child.pid, signum)
    check_end(tmp_path, child, code, golden)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(start, golden, tmp_path):
    child = start("--set", "eval_s=0.5")
    child.wait_for(logged(tmp_path, count=7))
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGTERM)
    check_end(tmp_path, child, 75, golden)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_waiting_for_data_is_seen_and_no_worker_complains(
    start, signum, code, golden, tmp_path
):
    """The signal goes to the whole process group, as Ctrl-C in a terminal does; the data never come."""
    child = start("--set", "workers=2", "--set", "data_s=1000")
    child.wait_for((tmp_path / "run" / "checkpoints").is_dir)
    time.sleep(0.5)
    begun = time.monotonic()
    os.killpg(child.pid, signum)
    check_end(tmp_path, child, code, golden)
    assert time.monotonic() - begun < 30  # and not 1000
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_to_the_group_finds_workers_at_work_and_they_say_nothing(
    start, signum, code, golden, tmp_path
):
    """They serve the step in hand, and are gone with the run."""
    child = start("--set", "workers=2", "--set", "step_s=0.3", "--set", "data_s=0.002")
    child.wait_for(logged(tmp_path))
    os.killpg(child.pid, signum)
    check_end(tmp_path, child, code, golden)
    assert child.err.read_text().count("\n") == 1  # how to go on
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


def test_twenty_signals_are_as_good_as_one(start, golden, tmp_path):
    child = start("--set", "step_s=0.3", "--checkpoint-every", "1")
    child.wait_for(logged(tmp_path))
    for _ in range(20):
        os.kill(child.pid, signal.SIGTERM)
    check_end(tmp_path, child, 75, golden)


def test_signals_during_a_save_let_it_end_and_begin_no_other_inside_it(start, golden, tmp_path, monkeypatch):
    """Each file takes a while here; twenty signals arrive while one of them is written."""
    create = LocalFs.create

    def slow(self, path):
        begun = [p for p in path.parent.parent.iterdir() if p.name.startswith(".tmp-0")]
        if len(begun) > 1:  # two saves at once
            os._exit(99)
        time.sleep(0.2)
        return create(self, path)

    monkeypatch.setattr(LocalFs, "create", slow)
    child = start("--checkpoint-every", "3")
    checkpoints = tmp_path / "run" / "checkpoints"
    child.wait_for(lambda: checkpoints.is_dir() and any(checkpoints.glob(".tmp-0*")))
    for _ in range(20):
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.005)
    monkeypatch.undo()
    ended, out, err = child.end()
    assert ended == 75, err
    assert hidden(tmp_path / "run") == []
    assert json.loads(out.splitlines()[-1])["steps_attempted"] == max(steps(tmp_path / "run"))
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(golden)


def delivered(pid, signum):
    """Whether a signal that was sent has reached the process: two that wait together would be one."""

    def happened():
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # not Linux
            time.sleep(0.5)
            return True
        waiting = [
            int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd"))
        ]
        return not any(mask >> (signum - 1) & 1 for mask in waiting)

    return happened


def test_a_second_ctrl_c_ends_a_step_that_never_does(fork, golden, tmp_path):
    """Nothing is waited for, and the checkpoint before it is whole."""

    def change(recipe, _):
        def train_step(state, batch):
            if state.attempted_steps == 5 and (tmp_path / "stuck").exists():
                time.sleep(1000)
            return recipe.train_step(state, batch)

        return attrs.evolve(recipe, train_step=train_step)

    (tmp_path / "stuck").touch()
    out, recipe = tmp_path / "run", changed(tmp_path, change)
    child = fork(tmp_path, "run", recipe, "--out", str(out), *SLOW, "--checkpoint-every", "2")
    child.wait_for(lambda: logged(tmp_path, count=5)() and 4 in steps(out))
    os.kill(child.pid, signal.SIGINT)
    wait_until(delivered(child.pid, signal.SIGINT))
    time.sleep(0.1)
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)  # the first one waits for the step
    os.kill(child.pid, signal.SIGINT)
    code, said, _ = child.end()
    assert code == 130
    assert '"state"' not in said  # it had no time for that
    (tmp_path / "stuck").unlink()
    train(out, resume=True)
    assert digest(out) == digest(golden)


class Stuck(Points):
    """Its samples never come; who was asked for one writes down its process id."""

    def __init__(self, folder):
        super().__init__(28, 1)
        self.folder = folder

    def __getitem__(self, index):
        if (self.folder / "stuck").exists():
            (self.folder / f"asked-{os.getpid()}").touch()
            time.sleep(1000)
        return super().__getitem__(index)


def test_a_run_that_is_killed_leaves_no_worker_and_no_lock(fork, golden, tmp_path):
    """The workers hang in ``__getitem__``, ignore SIGTERM, and have inherited every descriptor of the run."""

    def change(recipe, _):
        stuck = attrs.evolve(recipe.batches, dataset=Stuck(tmp_path), num_workers=2)
        return attrs.evolve(recipe, batches=stuck)

    (tmp_path / "stuck").touch()
    out, recipe = tmp_path / "run", changed(tmp_path, change)
    child = fork(tmp_path, "run", recipe, "--out", str(out), *SLOW)
    child.wait_for(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    assert run_owner(out).pid == child.pid
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    wait_until(lambda: run_owner(out) is None)
    for worker in tmp_path.glob("asked-*"):
        wait_until(lambda pid=worker.name[6:]: not running(pid))
    (tmp_path / "stuck").unlink()
    assert train(out, resume=True).state == "finished"
    assert digest(out) == digest(golden)


def test_a_signal_before_the_first_step_leaves_nothing(fork, tmp_path):
    recipe = tmp_path / "slow.py"
    recipe.write_text(
        "import time, attrs\n@attrs.frozen\nclass Config:\n    pass\n"
        "def build(config, device):\n    print('building', flush=True)\n    time.sleep(1000)\n"
    )
    child = fork(tmp_path, "run", str(recipe), "--out", str(tmp_path / "run"), *SLOW)
    child.wait_for(lambda: "building" in child.said())
    os.kill(child.pid, signal.SIGTERM)
    code, said, err = child.end()
    assert (code, err) == (75, "steploop: interrupted before the first step; there was nothing to save.\n")
    last = json.loads(said.splitlines()[-1])
    assert (last["state"], last["exit_code"], last["run"]) == ("interrupted", 75, None)
    assert last["again"].startswith(f"steploop run {recipe} --out ")
    assert not (tmp_path / "run").exists()


def swallows(path, signum, swallower):
    """A recipe whose build swallows what a signal raises, and goes on for long."""
    path.write_text(
        f"import os, time, weakref, attrs\nsignum = {int(signum)}\n"
        "@attrs.frozen\nclass Config:\n    pass\n"
        "def send(*_, ours=True):\n    os.kill(os.getpid(), signum)\n    time.sleep(0)\n"
        "class Thing:\n    pass\nclass Deleted:\n    __del__ = send\nclass Named:\n    __set_name__ = send\n"
        f"def build(config, device):\n{swallower}\n    time.sleep(20)\n    raise RuntimeError('went on')\n"
    )
    return str(path)


WEAK = "    thing = Thing(); gone = weakref.ref(thing, send); del thing"
FINALIZER = "    Deleted()"
NAMED = "    class Owner:\n        named = Named()"
BROKEN = "    try: send()\n    except: pass\n    raise ImportError('cannot load module more than once per process')"
BARE = "    for _ in range(3):\n        try: send()\n        except: pass"


@pytest.mark.parametrize(
    ("swallower", "signum", "code"),
    [
        (WEAK, signal.SIGTERM, 75),
        (WEAK, signal.SIGINT, 130),
        (FINALIZER, signal.SIGHUP, 75),
        (FINALIZER, signal.SIGINT, 130),
        (BARE, signal.SIGUSR1, 75),
        (NAMED, signal.SIGINT, 130),  # Python 3.11 makes a RuntimeError of it
        (
            BROKEN,
            signal.SIGTERM,
            75,
        ),  # as NumPy says that C code of torch imports, swallows it, and imports again
    ],
    ids=[
        "weak reference",
        "weak reference, Ctrl-C",
        "finalizer",
        "finalizer, Ctrl-C",
        "bare except",
        "set_name",
        "half imported",
    ],
)
def test_what_a_signal_raises_where_it_is_swallowed_is_raised_again(fork, swallower, signum, code, tmp_path):
    """And nothing is said of it; nor does the second one count as a second Ctrl-C, which would say nothing at all."""
    recipe = swallows(tmp_path / "swallows.py", signum, swallower)
    ended, said, err = fork(tmp_path, "run", recipe, "--out", str(tmp_path / "run"), *SLOW).end()
    assert (ended, err) == (code, "steploop: interrupted before the first step; there was nothing to save.\n")
    assert json.loads(said.splitlines()[-1])["exit_code"] == code
    assert not (tmp_path / "run").exists()


def test_a_second_signal_interrupts_nothing_that_is_cleaned_up(fork, tmp_path):
    tidy = "    try: send()\n    finally:\n        send()\n        print('tidy', flush=True)"
    recipe = swallows(tmp_path / "swallows.py", signal.SIGTERM, tidy)
    ended, said, _ = fork(tmp_path, "run", recipe, "--out", str(tmp_path / "run"), *SLOW).end()
    assert (ended, said.splitlines()[-2]) == (75, "tidy")


LOADED = {
    "in build": "",
    "while the recipe is loaded": "class Owner:\n    named = Named()\n",
    "half imported": "try: send()\nexcept: pass\nraise ImportError('cannot load module more than once per process')\n",
}


@pytest.mark.parametrize("ending", LOADED.values(), ids=LOADED)
def test_a_command_that_swallowed_a_signal_ends_by_it_all_the_same(ending, tmp_path):
    recipe = swallows(tmp_path / "swallows.py", signal.SIGINT, FINALIZER)
    Path(recipe).write_text(Path(recipe).read_text() + ending)
    command = [sys.executable, "-m", "steploop", "check", recipe]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "steploop: interrupted.\n")


def test_a_hangup_that_was_ignored_at_the_start_ends_nothing(tmp_path):
    """As under nohup."""

    @contextmanager
    def ignoring():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        yield

    arguments = (
        "run",
        POINTS,
        "--out",
        str(tmp_path / "run"),
        *SLOW,
        "--epochs",
        "1",
        "--set",
        "step_s=0.05",
    )
    child = Forked(tmp_path, *arguments, inside=ignoring())
    child.wait_for(logged(tmp_path))
    os.kill(child.pid, signal.SIGHUP)
    assert child.end()[0] == 0
    assert json.loads((tmp_path / "run" / "status.json").read_bytes())["state"] == "finished"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_torch_is_loaded_is_no_failure_either(signum, code, tmp_path):
    """The first line comes before torch: whoever requeues jobs by their code keeps this one."""
    command = [sys.executable, "-m", "steploop", "run", POINTS, "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == f"starting {POINTS}: loading torch ...\n"
        child.send_signal(signum)
        out, err = child.communicate(timeout=300)
    assert (child.returncode, json.loads(out)["state"]) == (code, "interrupted")
    assert err == "steploop: interrupted before the first step; there was nothing to save.\n"
    assert list(tmp_path.iterdir()) == []


EARLY = (
    "import sys; before = {*sys.modules}; import steploop.tools.cli; print(*sorted({*sys.modules} - before))"
)


def test_little_is_imported_before_signals_are_caught():
    """A signal that comes before ends the process without a word: the interpreter's own start and this, 15 ms each."""
    done = subprocess.run([sys.executable, "-c", EARLY], check=True, capture_output=True, text=True)
    found = set(done.stdout.split())
    assert "steploop.runs.signals" in found
    assert not found & {"attrs", "importlib.abc", "json", "pathlib", "socket", "tempfile", "torch", "typer"}


LATE = """
import os, signal, sys

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)  # Python has put the system's handlers back by now

late = Late()
sys.argv = ["steploop", "status", "nowhere"]
from steploop.tools.cli import main
main()
"""


def test_a_signal_while_python_shuts_down_changes_no_exit_code(tmp_path):
    """The second of two signals that a scheduler sends may come when the first has done its work."""
    done = subprocess.run(
        [sys.executable, "-c", LATE], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("steploop: ")


def test_a_run_directory_belongs_to_one_process(start, fork, tmp_path):
    """The second one says who has it and writes nothing; a kill leaves no stale lock."""
    child = start("--set", "step_s=1")
    child.wait_for(logged(tmp_path))
    before = len(lines(tmp_path / "run"))
    (tmp_path / "second").mkdir()
    code, _, err = fork(tmp_path / "second", "resume", str(tmp_path / "run")).end()
    assert code == 6
    assert f"process {child.pid} on " in err
    assert "resumed" not in [line.get("event") for line in lines(tmp_path / "run")]
    assert len(lines(tmp_path / "run")) >= before
    code, _, err = fork(tmp_path / "second", "run", POINTS, "--out", str(tmp_path / "run")).end()
    assert code == 6, err
    os.kill(child.pid, signal.SIGKILL)
    child.end()
    assert train(tmp_path / "run", {"step_s": 0.0}, resume=True).state == "finished"  # the lock went with it


def test_of_many_that_start_in_one_directory_one_trains(fork, tmp_path):
    folders = [tmp_path / str(n) for n in range(6)]
    for folder in folders:
        folder.mkdir()
    arguments = ("run", POINTS, "--out", str(tmp_path / "run"), *SLOW, "--set", "step_s=0.3")
    children = [fork(folder, *arguments) for folder in folders]
    codes = sorted(child.end()[0] for child in children)
    assert codes[0] == 0
    # 6 while the winner holds the lock; one that comes when it is through finds a run there and is refused with 2
    assert set(codes[1:]) <= {2, 6}
