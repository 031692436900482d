"""Ten loops that people publish: plain PyTorch on one side, our steps on the other, the same bits; resumed half-way too."""

import importlib
from functools import reduce
from pathlib import Path

import pytest
import torch

from steploop import TrainState, checkpoint

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
