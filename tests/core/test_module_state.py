"""What a module keeps and does besides its parameters is in the state, or refused by name.

The oracle is the same module in a loop written by hand.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from forms import in_every_form
from torch import nn
from torch.nn.utils import prune

from steploop import (
    Optimizer,
    TrainState,
    accumulate,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.trees import first_difference
from steploop.errors import CheckpointIncompatibleError, ConfigError, ObjectiveError

INF = float("inf")
SGD = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def batches(count=6):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(4, 3, generator=generator) for _ in range(count)]


def square(model, batch):
    return model(batch).square().mean()


def step(state, batch, *, donate=True):
    state = unscale_and_clip(backward_scaled(forward_loss(state, batch, square)), max_norm=INF)
    return optimizer_step(state, donate=donate)


def skipped(state, batch):
    def explosive(model, data):
        return square(model, data) * INF

    return optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, batch, explosive)), max_norm=INF)
    )


def made(make, *, other=False):
    torch.manual_seed(1 if other else 0)
    return make()


def by_hand(make, data):
    model = made(make)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for batch in data:
        optimizer.zero_grad()
        square(model, batch).backward()
        optimizer.step()
    return model


def values_of(model):
    named = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    extra = {
        n: m.get_extra_state()
        for n, m in model.named_modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    }
    return {"tensors": named, "extra": extra}


def values_in(state):
    return {"tensors": {**state.params, **state.buffers}, "extra": state.tensors.extra}


def create(make, *, other=False, **options):
    return TrainState.create(made(make, other=other), SGD, **options)


# -- parameters with hooks and attributes -----------------------------------------------------------------------------


def clamp_gradient(param):
    param.grad.clamp_(-0.05, 0.05)


class Masked(nn.Module):
    """Gradient masks, a rule after the gradient, a tag, and what a hook itself holds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.body.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 1.0]))
        self.body.weight.register_hook(lambda g: g + 0.01)
        self.body.bias.register_post_accumulate_grad_hook(clamp_gradient)
        self.body.weight.tag = "kept"

    def forward(self, x):
        return self.body(x)


class Tagged(nn.Parameter):
    """A parameter of a library's own class."""


class OfAnotherClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = Tagged(torch.randn(3))
        self.weight.axes = ("features",)

    def forward(self, x):
        return x * self.weight


class OnAFrozenOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.stem = nn.Linear(3, 3), nn.Linear(3, 3)
        self.stem.requires_grad_(requires_grad=False)
        self.stem.weight.tag = "frozen"

    def forward(self, x):
        return self.body(self.stem(x))


# -- buffers and extra state ------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """An extra state of a Python number and a tensor; it decides what comes out."""

    def __init__(self):
        super().__init__()
        self.body, self.calls, self.seen = nn.Linear(3, 3), 0, torch.zeros(())

    def get_extra_state(self):
        return {"calls": self.calls, "seen": [self.seen, "text", None]}

    def set_extra_state(self, state):
        self.calls, self.seen = state["calls"], state["seen"][0]

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + x.sum().detach()
        return self.body(x) * min(1.0, self.calls / 4) + torch.tanh(self.seen)


class Nested(nn.Module):
    """Two modules of that kind, one of them inside."""

    def __init__(self):
        super().__init__()
        self.first, self.rest = Counting(), nn.Sequential(nn.Tanh(), Counting())

    def forward(self, x):
        return self.rest(self.first(x))


class LateBuffer(nn.Module):
    """A mean that is None until the first pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("mean", None)
        self.register_buffer("never", None)

    def forward(self, x):
        found = x.mean(0).detach()
        self.mean = found if self.mean is None else 0.9 * self.mean + 0.1 * found
        return self.body(x - self.mean)


class GrowingQueue(nn.Module):
    """Keeps the last ten rows that it saw, and none at the beginning."""

    def __init__(self, rows=0):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("queue", torch.zeros(rows, 3))

    def forward(self, x):
        self.queue = torch.cat([self.queue, x.detach()])[-10:]
        return self.body(x) + self.queue.mean(0)


class Ranges(nn.Module):
    """An observer as torch.ao has them: its buffers take the shape of the data, in place."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.register_buffer("low", torch.zeros(0))

    def forward(self, x):
        if self.low.numel() == 0:
            self.low.resize_(3).copy_(x.amin(0))
        self.low.copy_(torch.minimum(self.low, x.amin(0)))
        return self.body(x - self.low)


# -- parameters that a forward pass moves -----------------------------------------------------------------------------


class Moving(nn.Module):
    """Frozen parameters that follow trained ones, as momentum encoders do, in one of the ways to write it."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(3, 3), nn.Linear(3, 3)
        self.key.requires_grad_(requires_grad=False)

    def move(self, key, query):
        with torch.no_grad():
            key.mul_(0.9).add_(query, alpha=0.1)

    def forward(self, x):
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            self.move(key, query)
        return self.query(x) - self.key(x)


class MovingByData(Moving):
    def move(self, key, query):
        key.data.mul_(0.9).add_(query.data, alpha=0.1)


class MovingByNewData(Moving):
    def move(self, key, query):
        key.data = 0.9 * key.data + 0.1 * query.data


class MovingByCopy(Moving):
    def move(self, key, query):
        key.data.copy_(0.9 * key.detach() + 0.1 * query.detach())


class MaxNorm(nn.Module):
    """An embedding that renormalises the rows that it looks up."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, max_norm=0.7)

    def forward(self, x):
        return self.table((x.abs().sum(1) * 10).long() % 5)


class Clamped(nn.Module):
    """A trained weight that a forward pass keeps within bounds."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            self.body.weight.clamp_(-0.3, 0.3)
        return self.body(x)


class ClampedByData(Clamped):
    def forward(self, x):
        self.body.weight.data.clamp_(-0.3, 0.3)
        return self.body(x)


class Spectral(nn.Module):
    """torch's own: it turns a buffer at every pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))

    def forward(self, x):
        return self.body(x)


KEEPING = [
    Masked, OfAnotherClass, OnAFrozenOne, Counting, Nested, LateBuffer, GrowingQueue, Ranges, Spectral,
]  # fmt: skip
MOVING = [Moving, MovingByData, MovingByNewData, MovingByCopy, MaxNorm, Clamped, ClampedByData]


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


# -- what others do to the module ---------------------------------------------------------------------------------------


class MakesALayer(nn.Module):
    """Adapts to its input in the first pass, as people write it who do not know of lazy layers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x):
        if not hasattr(self, "head"):
            self.head = nn.Linear(x.shape[1], 2)
        return self.head(self.body(x))


BEHIND = "The model was changed behind the state: {}. A state trains the tensors that it was made with."


def test_a_layer_that_the_first_pass_makes_is_refused_by_name():
    state = create(MakesALayer)
    with pytest.raises(ConfigError, match=re.escape("head.weight, head.bias")) as caught:
        step(state, batches()[0])
    assert str(caught.value).startswith(
        BEHIND.format("it has new layers, parameters or buffers: head.weight, head.bias")
    )


def chain():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def loads_by_assignment(model):
    model.load_state_dict(made(chain, other=True).state_dict(), assign=True)


def gives_a_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(2, 3))


def gives_a_tied_parameter(model):
    model[2].weight = model[0].weight


def gives_a_head(model):
    model[2] = nn.Linear(3, 2)


def adds_a_layer(model):
    model.append(nn.Linear(2, 2))


def adds_a_layer_without_values(model):
    model.append(nn.Tanh())


def adds_a_buffer(model):
    model.register_buffer("mask", torch.ones(3))


def removes_a_layer(model):
    del model[2]


def removes_a_parameter(model):
    del model[2].bias


def sets_a_parameter_to_none(model):
    model[2].bias = None


def prunes(model):
    prune.random_unstructured(model[2], "weight", amount=0.5)


def reparametrizes(model):
    nn.utils.parametrizations.weight_norm(model[2])


def moves_the_dtype(model):
    model.double()


def thaws(model):
    model[0].bias.requires_grad_(requires_grad=True)


BEHIND_THE_STATE = [
    (loads_by_assignment, "its parameter 0.weight was replaced by another tensor"),
    (gives_a_parameter, "its parameter 2.weight was replaced by another tensor"),
    (gives_a_tied_parameter, "its parameter 2.weight was replaced by another tensor"),
    (gives_a_head, "its layer '2' was replaced by another one"),
    (adds_a_layer, "it has new layers, parameters or buffers: 3.weight, 3.bias"),
    (adds_a_layer_without_values, "it has new layers, parameters or buffers: 3"),
    (adds_a_buffer, "it has new layers, parameters or buffers: mask"),
    (removes_a_layer, "layers, parameters or buffers were removed: 2.weight, 2.bias"),
    (removes_a_parameter, "its parameter 2.bias was removed"),
    (sets_a_parameter_to_none, "2.bias"),
    (prunes, "2.weight"),
    (reparametrizes, "2."),
    (
        moves_the_dtype,
        "its parameters were moved: 0.weight is torch.float64 on cpu now, and was torch.float32 on cpu when the state",
    ),
    (thaws, "0.bias requires a gradient, but it did not when the state was made"),
]


@pytest.mark.parametrize("started", [False, True], ids=["before the first step", "after a step"])
@pytest.mark.parametrize(("change", "says"), BEHIND_THE_STATE, ids=lambda v: getattr(v, "__name__", ""))
def test_a_module_that_is_changed_behind_the_state_is_refused_by_name_at_the_next_step(change, says, started):
    model = made(chain)
    model[0].bias.requires_grad_(requires_grad=False)
    state = TrainState.create(model, SGD)
    if started:
        state = step(state, batches()[0])
    change(state.model)
    with pytest.raises(ConfigError) as caught:
        step(state, batches()[1])
    assert says in str(caught.value), str(caught.value)
    assert "TrainState.create(model" in str(caught.value)


def test_values_that_are_copied_into_the_module_are_the_states():
    """load_state_dict without assign writes into the state's own tensors: what is trained is what is saved."""
    state = create(chain)
    state.model.load_state_dict(made(chain, other=True).state_dict())
    twin = create(chain, other=True)
    state, twin = step(state, batches()[0]), step(twin, batches()[0])
    assert first_difference(dict(state.params), dict(twin.params)) is None
    assert checkpoint.digest(state) == checkpoint.digest(twin)


def test_a_new_state_of_the_changed_module_trains_it():
    model = made(chain)
    state = step(TrainState.create(model, SGD), batches()[0])
    gives_a_head(state.model)
    model[0].requires_grad_(requires_grad=False)
    fresh = step(TrainState.create(model, SGD), batches()[1])
    assert fresh.model[2].weight is fresh.params["2.weight"]
    assert list(fresh.slots) == ["1.weight", "1.bias", "2.weight", "2.bias"]


# -- objectives that reach other tensors ------------------------------------------------------------------------------


def gradients(state, objective, *, accumulated):
    if accumulated:
        return accumulate(state, batches(2), objective)
    return backward_scaled(forward_loss(state, batches()[0], objective))


NO_GRADIENT = (
    "No parameter of the state got a gradient: the loss depends on other tensors than the state's. Let the objective compute "
    "with the model that it is given, objective(model, batch), and with no other copy of it."
)


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_loss_of_another_model_is_an_error_and_no_step(accumulated):
    other = made(chain, other=True)
    state = create(chain)

    def elsewhere(_, batch):
        return square(other, batch)

    with pytest.raises(ObjectiveError) as caught:
        gradients(state, elsewhere, accumulated=accumulated)
    assert str(caught.value) == NO_GRADIENT
    assert all(p.grad is None for p in state.params.values())
    assert step(state, batches()[0]).step == 1


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("part", [0, 1])
def test_an_objective_that_calls_backward_itself_is_refused_and_leaves_no_gradient(accumulated, part):
    seen = []

    def inner(model, batch):
        seen.append(1)
        if len(seen) == part + 1:
            F.softplus(model(batch)).mean().backward()
        return square(model, batch)

    if part and not accumulated:
        return
    state = create(chain)
    with pytest.raises(ObjectiveError) as caught:
        gradients(state, inner, accumulated=accumulated)
    assert str(caught.value) == (
        "The objective called backward() itself. An objective returns the loss; backward_scaled computes the gradients. For "
        "gradients inside of an objective, use torch.autograd.grad(..., create_graph=True)."
    )
    assert all(p.grad is None for p in state.params.values())
