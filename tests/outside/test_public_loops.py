"""Ten loops that people publish: plain PyTorch on one side, our steps on the other, the same bits; resumed half-way, and compiled."""

import importlib
from functools import reduce
from pathlib import Path

import pytest
import torch
from compiled_runs import run_as_it_is

from steploop import TrainState, checkpoint, compile  # noqa: A004  (steploop.compile, as in torch.compile)
from steploop.errors import CompileError

LOOPS = sorted(path.stem for path in (Path(__file__).parent / "public_loops").glob("*.py"))


def values_of(loop, state):
    """What the loop by hand returns, of our state."""
    if hasattr(loop, "result"):
        return loop.result(state)
    if isinstance(state, TrainState):
        return {**state.params, **state.buffers}
    return {f"{part}.{name}": t for part, s in state.items() for name, t in values_of(loop, s).items()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert different == []


@pytest.mark.parametrize("name", LOOPS)
def test_twenty_steps_are_those_of_the_loop_by_hand_and_a_resumed_run_goes_on(name, tmp_path):
    loop = importlib.import_module(f"public_loops.{name}")
    batches = loop.batches()
    assert len(batches) == 20
    by_hand = loop.by_hand(batches)
    begun = values_of(loop, loop.initial())
    half = reduce(loop.train_step, batches[:10], loop.initial())
    checkpoint.save(half, tmp_path / "half")
    whole = reduce(loop.train_step, batches[10:], half)
    assert_equal(values_of(loop, whole), by_hand)
    assert any(not torch.equal(begun[key], value) for key, value in by_hand.items() if key in begun)
    resumed = checkpoint.load(tmp_path / "half", like=loop.initial())
    assert_equal(values_of(loop, reduce(loop.train_step, batches[10:], resumed)), by_hand)


REFUSED = {"sam": r"lets SAM evaluate the loss again"}
TOLERANCES = {"gpt": 1e-2}  # in bfloat16


@pytest.mark.parametrize("name", LOOPS)
def test_compiled_they_give_the_losses_of_eager_or_are_refused_by_name(name, monkeypatch):
    """Losses, and not weights: Adam amplifies the rounding of gradients that are 0, as those of a bias before BatchNorm."""
    run_as_it_is(monkeypatch)
    loop = importlib.import_module(f"public_loops.{name}")
    step = compile(loop.train_step)
    if name in REFUSED:
        with pytest.raises(CompileError, match=REFUSED[name]):
            reduce(step, loop.batches(), loop.initial())
        return
    eager, compiled, tolerance = loop.initial(), loop.initial(), TOLERANCES.get(name, 1e-4)
    for batch in loop.batches()[:8]:
        eager, compiled = loop.train_step(eager, batch), step(compiled, batch)
        for one, other in zip(states_of(eager), states_of(compiled), strict=True):
            torch.testing.assert_close(other.loss, one.loss, rtol=tolerance, atol=1e-5)
    assert step.figures.form == "compiled"


def states_of(value):
    return [value] if isinstance(value, TrainState) else list(value.values())
