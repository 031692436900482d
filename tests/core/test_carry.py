"""``state.carry`` is a value of the user's own that goes where the state goes; ``with_params`` gives a state other weights."""

import copy
import pickle
from collections import deque

import attrs
import numpy as np
import pytest
import torch
from forms import in_every_form
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, SpentStateError

INF = float("inf")
ADAM = Optimizer(torch.optim.Adam, lr=0.01)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x, hidden):
        out, hidden = self.cell(x, hidden)
        return self.head(out), hidden


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, 3, generator=generator) for _ in range(count)]


def zeros():
    return torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)


def make(*, other=False, **options):
    torch.manual_seed(1 if other else 0)
    carry = {"hidden": zeros(), "seen": 0, "notes": ["a", None, 0.5, True]}
    return TrainState.create(Recurrent(), ADAM, carry=carry, **options)


def step(state, batch, *, donate=True):
    """Truncated backpropagation through time: the hidden state goes from batch to batch without its graph."""
    carry = state.carry

    def objective(model, x):
        out, hidden = model(x, carry["hidden"])
        return out.square().mean(), {"hidden": hidden}

    state = forward_loss(state, batch, objective)
    state = state.with_carry({**carry, "hidden": state.outputs["hidden"], "seen": carry["seen"] + 1})
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0), donate=donate)


def by_hand(data):
    torch.manual_seed(0)
    model = Recurrent()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hidden = zeros()
    for x in data:
        optimizer.zero_grad()
        out, hidden = model(x, hidden)
        hidden = tuple(h.detach() for h in hidden)
        out.square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, hidden


def test_a_hidden_state_is_carried_from_batch_to_batch_in_every_form(tmp_path):
    model, hidden = by_hand(batches())
    for form, state in in_every_form(make, step, batches(), tmp_path).items():
        assert first_difference(dict(state.params), dict(model.named_parameters())) is None, form
        assert first_difference(state.carry["hidden"], hidden) is None, form
        assert (state.carry["seen"], state.carry["notes"]) == (6, ["a", None, 0.5, True]), form


def explosive(state, batch):
    def objective(model, x):
        out, hidden = model(x, state.carry["hidden"])
        return out.square().mean() * INF, {"hidden": hidden}

    moved = forward_loss(state, batch, objective)
    moved = moved.with_carry({**state.carry, "hidden": moved.outputs["hidden"], "seen": 99})
    return unscale_and_clip(backward_scaled(moved), max_norm=1.0)


def test_a_skipped_step_brings_back_the_carry_that_it_began_with():
    state = step(make(), batches()[0])
    before = copy.deepcopy(state.carry)
    state = optimizer_step(explosive(state, batches()[1]))
    assert state.finite is False
    assert first_difference(state.carry, before) is None


def test_a_skip_that_a_device_decides_selects_the_tensors_of_the_carry_and_refuses_what_it_cannot_select():
    """A number in Python cannot wait for the device's answer."""
    fused = Optimizer(torch.optim.Adam, lr=0.01, fused=True)
    torch.manual_seed(0)
    state = TrainState.create(Recurrent(), fused, carry={"hidden": zeros(), "count": [torch.zeros(())]})
    began = state.carry

    def ready(state, finite, carry):
        state = forward_loss(state, batches()[0], lambda m, x: m(x, began["hidden"])[0].square().mean())
        state = unscale_and_clip(backward_scaled(state.with_carry(carry)), max_norm=1.0)
        return state.replace(flight=state.flight.replace(finite=torch.tensor([finite])[0]))

    moved = {"hidden": (torch.ones(1, 2, 4), zeros()[1]), "count": [torch.ones(())]}
    taken = optimizer_step(ready(state, finite=True, carry=moved), donate=False)
    assert first_difference(taken.carry, moved) is None
    skipped = optimizer_step(ready(state, finite=False, carry=moved), donate=False)
    assert first_difference(skipped.carry, began) is None
    for other in ({**moved, "count": 1}, {**moved, "more": 1}, {**moved, "count": []}, None):
        with pytest.raises(ConfigError) as caught:
            optimizer_step(ready(state, finite=True, carry=other), donate=False)
        assert str(caught.value).startswith(
            "optimizer_step: the carry of the state changed its shape in a step that the device"
        )


def test_a_carry_shares_its_tensors_with_nobody_but_its_own_state():
    hidden = torch.ones(2, requires_grad=True)
    state = make().with_carry({"hidden": hidden * 2})
    assert not state.carry["hidden"].requires_grad
    twin = state.clone()
    assert twin.carry["hidden"].data_ptr() != state.carry["hidden"].data_ptr()
    twin.carry["hidden"].zero_()
    assert state.carry["hidden"].tolist() == [2.0, 2.0]
    again = state.with_carry(None)
    assert (again.carry, again.alive, state.carry["hidden"].tolist()) == (None, True, [2.0, 2.0])


def test_a_carry_survives_every_step_function():
    state = make(ema=True)
    for function in (
        lambda s: accumulate(s, batches(2), lambda m, x: m(x, zeros())[0].square().mean()),
        lambda s: unscale_and_clip(s, max_norm=1.0),
        optimizer_step,
        lambda s: update_ema(s, decay=0.9),
        lambda s: schedule(s, lambda t: 0.1),
        lambda s: attrs.evolve(s, epoch=1),
        lambda s: s.with_params({}),
    ):
        state = function(state)
        assert first_difference(state.carry, make().carry) is None
    evaluate(state, batches(1), lambda m, x: m(x, zeros())[0].square().mean())
    assert state.carry["seen"] == 0


@pytest.mark.parametrize(
    ("carry", "says"),
    [
        ({"queue": deque([1])}, "'carry.queue' is a deque"),
        ([torch.zeros(1), {"a": (np.zeros(2),)}], "'carry.1.a.0' is a ndarray"),
        ({"f": len}, "'carry.f' is a builtin_function_or_method"),
        ({("a", 1): 2}, "'carry[tuple]' is a tuple"),
        ({1, 2}, "'carry' is a set"),
        (np.float32(1.0), "'carry' is a float32"),
    ],
    ids=str,
)
def test_what_a_checkpoint_could_not_keep_is_refused_as_a_carry(carry, says):
    message = (
        "The carry of a state must be a tree of tensors, numbers, texts and None (lists, tuples, mappings), but "
        f"{says}."
    )
    for call in (
        lambda: make().with_carry(carry),
        lambda: TrainState.create(nn.Linear(1, 1), ADAM, carry=carry),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "carry",
    [
        0, 1.5, "text", True, [], {}, (), [[], {}], {"a": float("nan")}, {1: "x", None: 2, 0.5: [None], False: 3},
        torch.zeros(0), torch.arange(3), {"t": torch.tensor([True])}, torch.ones(2, dtype=torch.complex64),
        {"deep": [{"er": (torch.ones(2, 2).t(), [torch.zeros(())])}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_carry_of_any_such_form_is_saved_and_loaded(carry, tmp_path):
    state = make().with_carry(carry)
    digest = checkpoint.save(state, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=make(other=True))
    assert first_difference({"c": loaded.carry}, {"c": state.carry}) is None
    assert type(loaded.carry) is type(state.carry)
    assert checkpoint.digest(loaded) == digest


def test_a_spent_state_gives_no_carry_and_takes_none():
    state = make()
    step(state, batches()[0])
    for use, name in ((lambda: state.carry, "carry"), (lambda: state.with_carry(1), "with_carry")):
        with pytest.raises(
            SpentStateError, match=rf"^{name}: this state is spent: optimizer_step at attempted step 0"
        ):
            use()


# -- other weights ----------------------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained():
    state = TrainState.create(classifier(), ADAM, ema=True)
    state = forward_loss(
        state, torch.ones(4, 3) + torch.arange(4.0)[:, None], lambda m, x: m(x).square().mean()
    )
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))


def test_other_weights_make_a_state_that_trains_and_saves_them(tmp_path):
    state = trained()
    before = {name: t.detach().clone() for name, t in (*state.params.items(), *state.buffers.items())}
    head, mean = torch.full((2, 4), 0.25), torch.full((4,), 3.0)
    new = state.with_params({"2.weight": head, "1.running_mean": mean})
    assert first_difference({**state.params, **state.buffers}, before) is None
    expected = {**before, "2.weight": head, "1.running_mean": mean}
    assert first_difference({**new.params, **new.buffers}, expected) is None
    assert all(new.params[n].data_ptr() != state.params[n].data_ptr() for n in new.params)
    assert new.params["2.weight"].data_ptr() != head.data_ptr()
    assert new.params["2.weight"].requires_grad
    assert first_difference(dict(new.slots), dict(state.slots)) is None
    assert (new.step, new.loss, new.grads) == (1, state.loss, None)  # the results of the last step
    checkpoint.save(new, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a", like=trained())
    assert first_difference({**loaded.params, **loaded.buffers}, expected) is None
    data = torch.ones(4, 3)
    model = classifier()
    model.load_state_dict(expected)
    model.train()
    loss = forward_loss(new, data, lambda m, x: m(x).square().mean()).loss
    assert loss == model(data).square().mean().detach()


def test_no_names_give_a_copy_without_what_was_in_flight():
    state = forward_loss(trained(), torch.ones(4, 3), lambda m, x: m(x).square().mean())
    new = state.with_params({})
    assert first_difference(dict(new.params), dict(state.params)) is None
    with pytest.raises(Exception, match="no loss to differentiate"):
        backward_scaled(new)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"2.weigth": torch.zeros(2, 4)}, "the state has no parameter or buffer '2.weigth'. It has: 0.weight, 0.bias, 1.weight, "),
        ({"2.weight": torch.zeros(4, 2)}, "2.weight must be (2, 4) torch.float32, but is (4, 2) torch.float32."),
        ({"2.weight": torch.zeros(2, 4, dtype=torch.float64)}, "2.weight must be (2, 4) torch.float32, but is (2, 4) torch.float64."),
        ({"2.bias": [0.0, 0.0]}, "2.bias must be (2,) torch.float32, but is list."),
        ({"1.num_batches_tracked": torch.zeros(())}, "1.num_batches_tracked must be () torch.int64, but is () torch.float32."),
    ],
    ids=lambda v: str(v)[:20],
)  # fmt: skip
def test_weights_of_another_name_shape_or_kind_are_refused(values, says):
    state = trained()
    with pytest.raises(ConfigError) as caught:
        state.with_params(values)
    assert str(caught.value).startswith(f"with_params: {says}")
    assert state.alive


# -- copies -----------------------------------------------------------------------------------------------------------


def test_a_deep_copy_is_a_clone_and_a_shallow_one_is_the_state_itself():
    state = trained()
    twin = copy.deepcopy({"states": [state, state]})["states"][0]
    assert first_difference({**twin.params, **twin.ema}, {**state.params, **state.ema}) is None
    optimizer_step(
        unscale_and_clip(
            backward_scaled(forward_loss(twin, torch.ones(4, 3), lambda m, x: m(x).sum())), max_norm=1.0
        )
    )
    assert state.alive
    assert not twin.alive
    assert copy.copy(state) is state
    with pytest.raises(SpentStateError):
        copy.deepcopy(twin)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_in_words(protocol, tmp_path):
    says = (
        "A TrainState cannot be pickled. Save it with steploop.checkpoint.save(state, directory) and load it with "
        "steploop.checkpoint.load(directory, like=state)."
    )
    with pytest.raises(ConfigError) as caught:
        pickle.dumps({"state": trained()}, protocol=protocol)
    assert str(caught.value) == says
    with pytest.raises(ConfigError, match="cannot be pickled"):
        torch.save(trained(), tmp_path / "state.pt")


def test_writing_to_a_tensor_that_was_given_changes_no_state():
    mine = torch.zeros(3)
    state = TrainState.create(
        torch.nn.Linear(2, 1), Optimizer(torch.optim.SGD, lr=0.1), carry={"hidden": mine}
    )
    later = state.with_carry({"hidden": mine})
    mine.add_(1)
    assert state.carry["hidden"].tolist() == later.carry["hidden"].tolist() == [0, 0, 0]
