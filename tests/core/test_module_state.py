"""What a module keeps and does besides its parameters is in the state, or refused by name.

The oracle is the same module in a loop written by hand.
"""

import copy

import pytest
import torch
from forms import in_every_form
from keeping_modules import (
    KEEPING,
    MOVING,
    Clamped,
    ClampedByData,
    Counting,
    GrowingQueue,
    LateBuffer,
    LiveExtra,
    Masked,
    MaxNorm,
    Moving,
    MovingByCopy,
    MovingByData,
    MovingByNewData,
    OfAnotherClass,
    OnAFrozenOne,
    Tagged,
)
from module_runs import SGD, batches, by_hand, create, skipped, square, step, values_in, values_of
from torch import nn

from steploop import TrainState, backward_scaled, checkpoint, evaluate, forward_loss
from steploop.core.trees import first_difference
from steploop.errors import CheckpointIncompatibleError, ConfigError


@pytest.mark.parametrize("make", KEEPING + MOVING)
def test_it_is_the_loop_by_hand_in_every_form(make, tmp_path):
    data = batches()
    expected = values_of(by_hand(make, data))
    ends = in_every_form(
        lambda other=False: create(make, other=other),
        step,
        data,
        tmp_path,
        forward_spends=make in {MaxNorm, Clamped, ClampedByData},
    )
    for form, state in ends.items():
        assert first_difference(values_in(state), expected) is None, form


@pytest.mark.parametrize("make", KEEPING + MOVING)
def test_a_skipped_step_brings_back_all_of_it(make):
    data = batches()
    state = step(create(make), data[0])
    before = copy.deepcopy(values_in(state))
    state = skipped(state, data[1])
    assert first_difference(values_in(state), before) is None
    first = create(make)
    before = copy.deepcopy(values_in(first))
    assert first_difference(values_in(skipped(first, data[0])), before) is None


@pytest.mark.parametrize("make", KEEPING + MOVING)
def test_an_evaluation_changes_nothing_of_it_and_sees_all_of_it(make):
    data = batches()
    state = create(make)
    before = copy.deepcopy(values_in(state))
    evaluate(state, data[:2], square)  # what a pass moves is not known before the first one
    assert first_difference(values_in(state), before) is None
    state = step(state, data[0])
    before = copy.deepcopy(values_in(state))
    model = by_hand(make, data[:1]).eval()
    with torch.no_grad():
        expected = square(model, data[1]).item()
    assert evaluate(state, [data[1]], square)["loss"] == pytest.approx(expected, rel=1e-6)
    assert first_difference(values_in(state), before) is None
    after = step(state, data[1])
    assert first_difference(values_in(after), values_of(by_hand(make, data[:2]))) is None


@pytest.mark.parametrize("make", [Moving, MovingByData, MovingByNewData, MovingByCopy])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_state_that_goes_in_keeps_its_frozen_parameters(make, steps):
    state = create(make)
    for batch in batches(steps):
        state = step(state, batch)
    before = copy.deepcopy(values_in(state))
    after = forward_loss(state, batches()[0], square)
    assert first_difference(values_in(state), before) is None
    assert not torch.equal(after.params["key.weight"], state.params["key.weight"])


@pytest.mark.parametrize("make", [MaxNorm, Clamped, ClampedByData])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_whose_trained_parameters_a_pass_has_moved_is_spent_by_it(make, steps):
    """Or left whole: never alive with other weights."""
    state = create(make)
    for batch in batches(steps):
        state = step(state, batch)
    before = copy.deepcopy(values_in(state))
    forward_loss(state, batches()[3], square)
    if state.alive:
        assert first_difference(values_in(state), before) is None


@pytest.mark.parametrize("make", [Counting, LiveExtra])
def test_calling_the_model_by_hand_changes_no_extra_state(make):
    state = step(create(make), batches()[0])
    before = copy.deepcopy(state.tensors.extra)
    state.machine.model(batches()[1])
    assert first_difference(state.tensors.extra, before) is None
    expected = values_of(by_hand(make, batches(2)))
    assert first_difference(values_in(step(state, batches()[1])), expected) is None


def test_hooks_and_attributes_are_on_every_copy(tmp_path):
    state = step(create(Masked), batches()[0])
    checkpoint.save(state, tmp_path / "a")
    states = {
        "clone": state.clone(),
        "deepcopy": copy.deepcopy(state),
        "with other values": state.with_params({"body.weight": torch.ones(3, 3)}),
        "loaded": checkpoint.load(tmp_path / "a", like=create(Masked, other=True)),
        "pure": step(state, batches()[1], donate=False),
    }
    for form, one in states.items():
        weight, bias = one.params["body.weight"], one.params["body.bias"]
        assert (weight.tag, len(weight._backward_hooks)) == ("kept", 2), form
        assert len(bias._post_accumulate_grad_hooks) == 1, form
        grads = backward_scaled(forward_loss(one, batches()[2], square)).grads
        assert torch.allclose(grads["body.weight"][:, 1], torch.tensor(0.01)), form
        assert grads["body.bias"].abs().max() <= 0.05, form
    of_a_class = create(OfAnotherClass).clone().params["weight"]
    assert (type(of_a_class), of_a_class.axes) == (Tagged, ("features",))
    frozen = create(OnAFrozenOne).clone().params["stem.weight"]
    assert (frozen.tag, frozen.requires_grad) == ("frozen", False)


# -- what cannot be loaded, or held -----------------------------------------------------------------------------------


def test_a_queue_that_has_grown_is_loaded_where_it_begins_alike_and_refused_elsewhere(tmp_path):
    state = create(GrowingQueue)
    for batch in batches(2):
        state = step(state, batch)
    assert state.buffers["queue"].shape == (8, 3)
    checkpoint.save(state, tmp_path / "a")
    grown = step(
        create(GrowingQueue, other=True), batches()[0]
    )  # has four rows by now: its first shape is what counts
    assert checkpoint.load(tmp_path / "a", like=grown).buffers["queue"].shape == (8, 3)
    with pytest.raises(CheckpointIncompatibleError) as caught:
        checkpoint.load(tmp_path / "a", like=create(lambda: GrowingQueue(rows=2)))
    assert "buffer queue: saved as float32 (8, 3), but here it is float32 (2, 3)" in str(caught.value)
    with pytest.raises(CheckpointIncompatibleError, match="buffer queue: in the checkpoint only"):
        checkpoint.load(tmp_path / "a", like=create(lambda: nn.ModuleDict({"body": nn.Linear(3, 3)})))


def test_a_buffer_that_was_none_is_loaded_where_it_is_none_and_refused_where_there_is_none(tmp_path):
    state = step(create(LateBuffer), batches()[0])
    checkpoint.save(state, tmp_path / "a")
    assert torch.equal(
        checkpoint.load(tmp_path / "a", like=create(LateBuffer)).buffers["mean"], state.buffers["mean"]
    )
    with pytest.raises(CheckpointIncompatibleError, match="buffer mean: in the checkpoint only"):
        checkpoint.load(tmp_path / "a", like=create(lambda: nn.ModuleDict({"body": nn.Linear(3, 3)})))
    checkpoint.save(create(LateBuffer), tmp_path / "b")
    loaded = checkpoint.load(tmp_path / "b", like=state)
    assert "mean" not in loaded.buffers


def test_an_extra_state_of_another_module_is_refused_by_name(tmp_path):
    plain = lambda: nn.ModuleDict({"body": nn.Linear(3, 3)})  # noqa: E731
    checkpoint.save(create(Counting), tmp_path / "a")
    checkpoint.save(create(plain), tmp_path / "b")
    with pytest.raises(CheckpointIncompatibleError, match="extra state of the model: in the checkpoint only"):
        checkpoint.load(tmp_path / "a", like=create(plain))
    with pytest.raises(CheckpointIncompatibleError, match="extra state of the model: not in the checkpoint"):
        checkpoint.load(tmp_path / "b", like=create(Counting))
    kept = checkpoint.load(tmp_path / "b", like=create(Counting), migrate={})
    assert kept.tensors.extra[""]["calls"] == 0


class Unholdable(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.body, self.value = nn.Linear(3, 3), value

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": [object()]}, "gives a object (a.0), which a state cannot hold"),
        ({1, 2}, "gives a set (the whole), which a state cannot hold"),
        (b"bytes", "gives a bytes (the whole), which a state cannot hold"),
    ],
    ids=["object", "set", "bytes"],
)
def test_an_extra_state_that_no_checkpoint_holds_is_refused_when_the_state_is_made(value, says):
    with pytest.raises(ConfigError) as caught:
        TrainState.create(nn.Sequential(Unholdable(value)), SGD)
    assert str(caught.value).startswith(f"TrainState.create: get_extra_state() of 0 {says}.")
