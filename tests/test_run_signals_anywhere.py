"""A signal at any moment at all of a run (FAULTS D1): while it starts, steps, evaluates, saves, logs or ends.

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
from running import POINTS, digest, hidden

import steploop
from steploop.cli import call

PACKAGE = str(Path(steploop.__file__).parent)
QUICK = ["--no-tune", "--device", "cpu", "--quiet", "--checkpoint-every", "3"]
MOMENTS = 16  # for each of the three signals


class Calls:
    """Counts the calls of steploop's functions in this thread; at the ``nth`` this process gets a signal."""

    def __init__(self, nth=None, signum=None):
        self.count, self.nth, self.signum = 0, nth, signum

    def __call__(self, frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
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


@pytest.mark.parametrize(
    ("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_at_any_moment_loses_nothing(signum, expected, golden, tmp_path, capsys):
    """D1. It is resumed to the same state, or it never began and leaves nothing, or it had ended."""
    whole, calls = golden
    rng, endings = random.Random(signum), []
    for number in range(MOMENTS):
        out = tmp_path / str(number)
        moment = Calls(1 + int((number + rng.random()) * calls / MOMENTS), signum)
        with moment:
            code = call(["run", POINTS, "--out", str(out), *QUICK])
        said = capsys.readouterr()
        at = f"signal {signum} at call {moment.nth} of {calls}: exit code {code}, {said.err}"
        assert "Traceback" not in said.err, at
        if code == 0:
            endings.append("finished")
        elif not (out / "config.json").exists():
            assert code == expected, at
            assert said.err.startswith("steploop: interrupted before the first step"), at
            assert call(["run", POINTS, "--out", str(out), *QUICK]) == 0, at
            endings.append("never began")
        else:
            assert code == expected, at
            assert hidden(out) == [], at
            assert json.loads((out / "status.json").read_bytes())["state"] == "interrupted", at
            assert call(["resume", str(out), "--quiet"]) == 0, at
            endings.append("resumed")
        assert digest(out) == digest(whole), at
    assert endings.count("resumed") > MOMENTS // 2, endings
