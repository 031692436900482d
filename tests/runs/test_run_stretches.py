"""A compiled run takes steps in rows between two looks at it, and is the run of single steps in every bit and line."""

import signal

import attrs
import pytest
from compiled_runs import run_as_it_is
from hypothesis import given, settings
from hypothesis import strategies as st
from running import changed, kept, lines, train

from steploop.compilation import FoldingStep
from steploop.errors import NonFiniteError
from steploop.runs.due import Due
from steploop.runs.plan import Plan, lines_every
from steploop.runs.signals import StopFlag


@settings(max_examples=60, deadline=None)
@given(
    every=st.tuples(*[st.none() | st.integers(1, 9)] * 4),
    now=st.integers(0, 30),
    per_epoch=st.integers(1, 200),
)
def test_nothing_is_due_before_the_last_of_the_steps_left(every, now, per_epoch):
    lines_, evaluations, checkpoints, limit = every
    plan = Plan(log_every=lines_, checkpoint_every=checkpoints, limit_steps=limit)
    due = Due(plan, evaluations, per_epoch)
    left = due.steps_left(now)
    assert left >= 1
    assert left <= lines_every(plan, per_epoch)
    for step in range(now + 1, now + left):
        multiples = [n for n in (lines_every(plan, per_epoch), evaluations, checkpoints) if n]
        assert step != 1
        assert all(step % n for n in multiples)
        assert limit is None or step < limit or now >= limit
        assert not due.line(step - 1, step)
        assert not due.evaluation(step - 1, step)
        assert not due.checkpoint(step - 1, step)


class Data:
    """The recipe's batches: some of NaN, and something that happens before one is given."""

    def __init__(self, batches, bad, happens):
        self._batches, self._bad, self._happens = batches, bad, happens

    def __len__(self):
        return len(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)

    def epoch(self, epoch, start=0):
        for index, (x, y) in enumerate(self._batches.epoch(epoch, start), start):
            number = epoch * len(self) + index
            self._happens(number)
            yield (x * float("nan") if number in self._bad else x), y


def recipe(folder, bad=(), happens=lambda number: None):
    return changed(folder, lambda made, config: attrs.evolve(made, batches=Data(made.batches, bad, happens)))


OPTIONS = {"compile": True, "log_every": 6, "checkpoint_every": 7}
VALUES = {"samples": 40, "eval_every": 13}  # two epochs of ten batches


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Graphs run as they are; the steps of each row."""
    run_as_it_is(monkeypatch)
    found, stretch = [], FoldingStep.stretch

    def watched(self, *args, **kwargs):
        taken = stretch(self, *args, **kwargs)
        found.append(taken.steps)
        return taken

    monkeypatch.setattr(FoldingStep, "stretch", watched)
    return found


def told(out):
    """The log without times, and without what was compiled when."""
    timed = ("_s", "data_wait", "capsule")
    return [
        {k: v for k, v in line.items() if not k.endswith(timed)}
        for line in lines(out)
        if line.get("event") not in {"compile", "stopped", "resumed"}
    ]


def test_rows_are_the_run_of_single_steps_however_it_is_cut(rows, tmp_path, monkeypatch):
    """Skipped steps, a signal while a batch of a row is fetched, a crash there: every line and checkpoint is the same."""
    bad, flag = {5, 6, 14}, StopFlag()

    def signalled(number):
        if number == 2:
            flag.handle(signal.SIGTERM)

    def failing(number):
        if number == 12:
            raise OSError("the disk is gone")

    with monkeypatch.context() as single:
        single.setattr(Due, "steps_left", lambda self, now: 1)
        train(tmp_path / "single", VALUES, recipe=recipe(tmp_path, bad), **OPTIONS)
    assert set(rows) <= {1}
    train(tmp_path / "rows", VALUES, recipe=recipe(tmp_path, bad), **OPTIONS)
    assert max(rows) == 4
    assert kept(tmp_path / "rows") == kept(tmp_path / "single")
    assert told(tmp_path / "rows") == told(tmp_path / "single")

    happens = {"now": signalled}

    def happening(number):
        happens["now"](number)

    file = recipe(tmp_path, bad, happening)
    summary = train(tmp_path / "cut", VALUES, recipe=file, flag=flag, **OPTIONS)
    assert (summary.state, summary.steps_attempted) == ("interrupted", 3)
    happens["now"] = failing
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "cut", resume=True, **{k: v for k, v in OPTIONS.items() if k != "compile"})
    happens["now"] = lambda number: None
    train(tmp_path / "cut", resume=True, **{k: v for k, v in OPTIONS.items() if k != "compile"})
    assert max(kept(tmp_path / "cut").items()) == max(kept(tmp_path / "single").items())
    assert told(tmp_path / "cut") == told(tmp_path / "single")


def test_the_error_that_ends_a_run_is_that_of_single_steps(rows, tmp_path, monkeypatch):
    """Its samples, its capsule and the skipped steps in the log."""
    said, steps_left = [], Due.steps_left
    for name in ("single", "rows"):
        monkeypatch.setattr(Due, "steps_left", steps_left if name == "rows" else lambda self, now: 1)
        with pytest.raises(NonFiniteError) as error:
            train(tmp_path / name, {**VALUES, "explode_at": 11, "precision": "fp32"}, **OPTIONS)
        said.append(str(error.value).replace(str(tmp_path / name), "OUT"))
    assert max(rows) > 1
    assert said[0] == said[1]
    assert "batch 4 of epoch 2" in said[0]
    assert "steploop replay OUT" in said[0]
    assert told(tmp_path / "rows") == told(tmp_path / "single")
