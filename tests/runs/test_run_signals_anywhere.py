"""A signal or a kill at any moment at all of a run: while it starts, steps, evaluates, saves or ends.

The moments are calls of steploop's own functions, counted, so that the same ones come up every time. What these would
catch: a place where a signal raises in the middle of something, a save or a status that is half done when it is looked
at, a flag that is set and forgotten, a directory left behind by a run that never began.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
from running import POINTS, Forked, digest, hidden
from test_run_resume import comparable

import steploop
from steploop.tools.cli import call

PACKAGE = str(Path(steploop.__file__).parent)
QUICK = ["--no-tune", "--device", "cpu", "--quiet", "--checkpoint-every", "3"]
MOMENTS = 12  # for each of the three signals
KILLS = 8  # for each kind of run


class Calls:
    """Counts calls of steploop's functions in this thread; at the ``nth`` this process gets a signal.

    Args:
        nth: which one, from 1.
        signum: the signal.
        name: count those of one function only, by its qualified name.
    """

    def __init__(self, nth=None, signum=None, name=None):
        self.count, self.nth, self.signum, self.name = 0, nth, signum, name

    def __call__(self, frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and self.name in {None, code.co_qualname}:
            self.count += 1
            if self.count == self.nth:
                sys.setprofile(None)
                os.kill(os.getpid(), self.signum)  # its handler runs before the function does

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


@pytest.fixture(autouse=True)
def _deaf():
    """A signal that comes before the run listens, or after, does nothing to the tests."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(signum, lambda *_: None) for signum in signals]
    yield
    for signum, handler in zip(signals, before, strict=True):
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk is not what is tested


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """An uninterrupted run, and how many calls it has."""
    folder = tmp_path_factory.mktemp("golden")
    assert call(["run", POINTS, "--out", str(folder / "first"), *QUICK]) == 0  # imports what it needs
    with Calls() as calls:
        assert call(["run", POINTS, "--out", str(folder / "run"), *QUICK]) == 0
    return folder / "run", calls.count


def signalled(moment, expected, whole, out, capsys):
    """Run with a signal at that moment, and go on; how the first run ended."""
    with moment:
        code = call(["run", POINTS, "--out", str(out), *QUICK])
    said = capsys.readouterr()
    at = f"call {moment.nth} of {moment.name}: exit code {code}, {said.err}"
    assert "Traceback" not in said.err, at
    if code == 0:
        ending = "finished"
    elif (out / "config.json").exists():
        ending = "interrupted"
        assert code == expected, at
        assert hidden(out) == [], at
        assert json.loads((out / "status.json").read_bytes())["state"] == "interrupted", at
        assert call(["resume", str(out), "--quiet"]) == 0, at
    else:
        ending = "never began"
        assert code == expected, at
        assert said.err.startswith("steploop: interrupted before the first step"), at
        assert call(["run", POINTS, "--out", str(out), *QUICK]) == 0, at
    assert digest(out) == digest(whole), at
    return ending


@pytest.mark.parametrize(
    ("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_at_any_moment_loses_nothing(signum, expected, golden, tmp_path, capsys):
    """It is resumed to the same state, or it never began and leaves nothing, or it had ended."""
    whole, calls = golden
    rng = random.Random(signum)
    moments = [1 + int((number + rng.random()) * calls / MOMENTS) for number in range(MOMENTS)]
    endings = [signalled(Calls(nth, signum), expected, whole, tmp_path / str(nth), capsys) for nth in moments]
    assert endings.count("interrupted") > MOMENTS // 2, endings


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        ("never began", "record"),
        ("never began", "announce"),
        ("interrupted", "Status.__init__"),
        ("interrupted", "CheckpointStore.prepare"),
        ("never began", "try_evaluation"),
        ("interrupted", "Phases._phase"),
        ("interrupted", "Loop.run"),
        ("interrupted", "Loop._step"),
        ("interrupted", "optimizer_step"),
        ("interrupted", "update_ema"),
        ("interrupted", "RunJournal.train"),
        ("interrupted", "CheckpointKeeper.save"),
        ("interrupted", "BackgroundSaver._snapshot"),
        ("interrupted", "Status.update"),
        ("interrupted", "Loop._evaluated"),
        ("interrupted", "fold_metrics"),
        ("interrupted", "next_epoch"),
        ("finished", "Loop._closed"),
        ("finished", "summarize"),
    ],
)
def test_a_signal_when_a_part_of_a_run_begins_is_seen_at_the_next_place_where_nothing_is_half_done(
    ending, name, golden, tmp_path, capsys
):
    """In the first and the second such part; what never began leaves no file behind that would refuse a new run."""
    whole, _ = golden
    moment = Calls(1, signal.SIGTERM, name)
    assert signalled(moment, 75, whole, tmp_path / "1", capsys) == ending
    assert moment.count == 1
    if ending == "interrupted":
        signalled(Calls(2, signal.SIGTERM, name), 75, whole, tmp_path / "2", capsys)


TOLD = ("state", "ending", "step", "epoch", "metrics", "best", "checkpoint", "best_checkpoint")


def everything(out):
    """The newest state of each phase, the log without its times and events, and what the status says of them."""
    status = json.loads((out / "status.json").read_bytes())
    states = {
        folder.name: (max(folder.glob("step-*")) / "state.json").read_bytes()
        for folder in out.glob("checkpoints*")
    }
    return states, comparable(out), {name: status.get(name) for name in TOLD}


@pytest.mark.parametrize(
    "values",
    [[], ["phases=true", "eval_every=3", "plateau=yes"], ["patience=1", "learning_rate=1.5", "epochs=4"]],
    ids=["plain", "phases", "early stopping"],
)
def test_a_kill_at_any_moment_costs_time_and_nothing_else(values, tmp_path, capsys):
    """Of every other run the resume is killed too. State, log and status are those of the uninterrupted run; no litter stays."""
    options = [*QUICK, "--log-every", "1", *(word for value in values for word in ("--set", value))]
    with Calls() as calls:
        assert call(["run", POINTS, "--out", str(tmp_path / "whole"), *options]) == 0
    whole, rng, killed = everything(tmp_path / "whole"), random.Random(len(values)), 0
    for number in range(KILLS):
        out, at = tmp_path / str(number), []
        for _ in range(1 + number % 2):
            begun = (out / "config.json").exists()
            words = ["resume", str(out), "--quiet"] if begun else ["run", POINTS, "--out", str(out), *options]
            at.append(rng.randrange(1, calls.count))
            child = Forked(tmp_path, *words, inside=Calls(at[-1], signal.SIGKILL))
            code, _, err = child.end()
            assert code in {0, -signal.SIGKILL}, (at, err)
            killed += code != 0
        begun = (out / "config.json").exists()
        words = ["resume", str(out), "--quiet"] if begun else ["run", POINTS, "--out", str(out), *options]
        assert call(words) == 0, (at, capsys.readouterr().err)
        assert everything(out) == whole, at
        assert [path.name for path in out.rglob(".*")] == [], at
    assert killed > KILLS // 2
