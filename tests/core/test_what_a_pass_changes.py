"""What a forward pass changes in its model: held in the state, or refused by name in the pass that shows it."""

import copy
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial, reduce
from types import SimpleNamespace
from typing import NamedTuple

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.state import attribute_marks, plain_attributes
from steploop.errors import ConfigError

# of torch 2.9, about a backward hook on a layer whose input needs no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

SGD = Optimizer(torch.optim.SGD, lr=0.05, momentum=0.9)


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, 8, 2, generator=generator)) for _ in range(count)]


def objective(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def step(state, batch, **options):
    return optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1e9), **options
    )


class Net(nn.Module):
    """A layer, something that hangs on it, and what a pass does with it."""

    def __init__(self, kept, use):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 2)
        self.kept = kept
        self.use = [use]

    def forward(self, x):
        return self.layer(x) * self.use[0](self, x)


class Own:
    """An object of the user's."""

    def __init__(self):
        self.calls = 0
        self.mean = torch.zeros(())


def queue(net, x):
    net.kept.append(x.detach().mean())
    return 1 + sum(net.kept) / len(net.kept)


def table(net, x):
    net.kept["calls"] = net.kept.get("calls", 0) + 1
    return 0.9 ** net.kept["calls"]


def attribute(net, x):
    net.kept.calls += 1
    return 0.9**net.kept.calls


def tensor(net, x):
    net.kept.mean = 0.9 * net.kept.mean + x.detach().mean()
    return 1 + net.kept.mean


class Called(Own):
    """One that is called."""

    def __call__(self, x):
        self.calls += 1
        return 0.9**self.calls


class Slotted:
    __slots__ = ("calls", "mean")

    def __init__(self):
        self.calls = 0


class Pair(NamedTuple):
    calls: int = 0
    mean: float = 0.0


@attrs.frozen
class Fields:
    calls: int = 0
    mean: torch.Tensor = attrs.field(factory=lambda: torch.zeros(()))


def fields(net, x):
    net.kept = attrs.evolve(net.kept, calls=net.kept.calls + 1, mean=net.kept.mean + x.detach().mean())
    return 0.9**net.kept.calls + net.kept.mean


def pair(net, x):
    net.kept = net.kept._replace(calls=net.kept.calls + 1, mean=net.kept.mean + float(x.mean()))
    return 0.9**net.kept.calls + net.kept.mean


def within(at):
    """The same of an object that hangs deeper."""

    def use(net, x):
        return attribute(SimpleNamespace(kept=at(net.kept)), x)

    return use


HELD = {
    "object in a list": (lambda: [Own()], within(lambda kept: kept[0])),
    "object in a dictionary": (lambda: {"a": (Own(), 1)}, within(lambda kept: kept["a"][0])),
    "object of an object": (lambda: SimpleNamespace(own=Own()), within(lambda kept: kept.own)),
    "object that is called": (Called, lambda net, x: net.kept(x)),
    "object of a partial function": (lambda: partial(Called().__call__), lambda net, x: net.kept(x)),
    "object with slots": (Slotted, attribute),
    "named tuple": (Pair, pair),
    "frozen value": (Fields, fields),
    "deque": (lambda: deque(maxlen=3), queue),
    "OrderedDict": (OrderedDict, table),
    "defaultdict": (lambda: defaultdict(int), table),
    "Counter": (Counter, table),
    "number of an object": (Own, attribute),
    "tensor of an object": (Own, tensor),
    "SimpleNamespace": (lambda: SimpleNamespace(calls=0), attribute),
}


def train_by_hand(net):
    """All batches, in plain PyTorch."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for batch in batches():
        sgd.zero_grad()
        objective(net, batch).backward()
        sgd.step()


@pytest.mark.parametrize("kind", list(HELD))
def test_what_can_be_held_goes_on_in_copies_and_resumed_runs_as_in_the_loop_by_hand(kind, tmp_path):
    make, use = HELD[kind]
    net = Net(make(), use)
    train_by_hand(net)

    def begin():
        return TrainState.create(Net(make(), use), SGD)

    half = reduce(step, batches()[:3], begin())
    copied = half.clone()
    checkpoint.save(half, tmp_path / "half")
    evaluate(half, batches(2), objective)
    for state in (half, copied, checkpoint.load(tmp_path / "half", like=begin())):
        ended = reduce(step, batches()[3:], state)
        assert torch.equal(ended.params["layer.weight"], net.layer.weight)
        assert type(ended.model.kept) is type(net.kept)
    assert getattr(ended.model.kept, "maxlen", None) == getattr(net.kept, "maxlen", None)


REFUSED = {
    "a random generator": (
        (lambda: torch.Generator().manual_seed(1), lambda net, x: torch.rand((), generator=net.kept)),
        (lambda: np.random.default_rng(1), lambda net, x: net.kept.random()),
        (lambda: np.random.RandomState(1), lambda net, x: net.kept.rand()),
        (lambda: random.Random(1), lambda net, x: net.kept.random()),
    ),
    "an array of NumPy": ((lambda: np.zeros(2), lambda net, x: np.add(net.kept, 1, out=net.kept)[0]),),
    "a set": (
        (set, lambda net, x: net.kept.add(len(net.kept)) or len(net.kept)),
        (lambda: [set()], lambda net, x: net.kept[0].add(len(net.kept[0])) or len(net.kept[0])),
    ),
    "a dict with a deque in it": (
        (lambda: {"a": deque(maxlen=3)}, lambda net, x: net.kept["a"].append(1) or len(net.kept["a"])),
    ),
    "a dict with a tuple in it": ((lambda: {(0, 1): 1}, lambda net, x: net.kept.update({(0, 1): 2}) or 1.0),),
    "a deque where there was none of its kind before": (
        (lambda: None, lambda net, x: setattr(net, "kept", deque([1], maxlen=3)) or 1.0),
    ),
    "an iterator": (
        (itertools.count, lambda net, x: next(net.kept)),
        (lambda: iter([1.0, 2.0]), lambda net, x: next(net.kept)),
        (lambda: (1.0 for _ in range(9)), lambda net, x: next(net.kept)),
    ),
}


@pytest.mark.parametrize(
    ("what", "number"), [(what, i) for what, some in REFUSED.items() for i in range(len(some))]
)
def test_what_cannot_be_held_is_refused_by_name_in_the_first_pass(what, number):
    make, use = REFUSED[what][number]
    state = TrainState.create(Net(make(), use), SGD)
    with pytest.raises(ConfigError, match=f"The model changes kept, {what}, in its forward pass") as error:
        step(state, batches()[0])
    assert ("torch.rand" in str(error.value)) == (what == "a random generator")
    assert state.alive
    unused = TrainState.create(Net(make(), lambda net, x: 1.0), SGD)
    assert reduce(step, batches(), unused).step == 6


def test_a_cache_by_shape_grows_and_is_none_of_the_state():
    def mask(net, x):
        return net.kept.setdefault(tuple(x.shape), 1.0)

    state = reduce(step, batches(), TrainState.create(Net({}, mask), SGD))
    assert state.step == 6
    assert not state.tensors.extra


def test_two_layers_go_on_with_one_dictionary_and_one_tensor():
    shared, total = {"calls": 0}, torch.zeros(())

    def first(net, x):
        net.kept["calls"] += 1
        net.total.add_(1)
        return 1.0

    net = nn.Sequential(Net(shared, first), Net(shared, lambda net, x: 0.9 ** net.kept["calls"] * net.total))
    net[0].total = net[1].total = total
    state = reduce(step, batches(), TrainState.create(net, SGD))
    evaluate(state, batches(2), objective)
    state = step(state, batches()[0])
    assert shared["calls"] == 7
    model = state.model
    assert model[0].total is model[1].total
    assert float(model[1].total) == 7


# -- in the backward pass, and in hooks -------------------------------------------------------------------------------


class InBackward(nn.Module):
    """A number, moved by a hook in the backward pass, that decides what the next pass computes."""

    def __init__(self, hook):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.scale = nn.Linear(2, 2), 1.0
        hook(self)

    def forward(self, x):
        return self.layer(x) * self.scale

    def move(self, *_):
        self.scale *= 0.9

    def moved(self, grad):
        self.move()
        return grad


class HalfOfThem:
    """A hook that counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return args[-1] * (self.calls % 2)


HOOKS = {
    "backward hook": lambda net: net.layer.register_full_backward_pre_hook(net.move),
    "hook on a parameter": lambda net: net.layer.weight.register_hook(net.moved),
    "object on a parameter": lambda net: net.layer.weight.register_hook(HalfOfThem()),
    "object on a layer": lambda net: net.layer.register_forward_hook(HalfOfThem()),
    "partial function": lambda net: net.layer.register_forward_hook(partial(HalfOfThem(), 1)),
}


@pytest.mark.parametrize("kind", list(HOOKS))
@pytest.mark.parametrize("how", [{}, {"donate": False}])
def test_what_hooks_change_goes_on_in_copies_and_resumed_runs_as_in_the_loop_by_hand(kind, how, tmp_path):
    net = InBackward(HOOKS[kind])
    train_by_hand(net)

    def begin():
        return TrainState.create(InBackward(HOOKS[kind]), SGD)

    half = reduce(partial(step, **how), batches()[:3], begin())
    copied = half.clone()
    checkpoint.save(half, tmp_path / "half")
    step(half, batches()[5], donate=False)  # is of no consequence
    for state in (half, copied, checkpoint.load(tmp_path / "half", like=begin())):
        assert torch.equal(reduce(step, batches()[3:], state).params["layer.weight"], net.layer.weight)


def test_a_backward_pass_moves_the_attributes_of_its_own_state():
    first = TrainState.create(InBackward(HOOKS["backward hook"]), SGD)
    other = reduce(step, batches()[:3], first.clone())
    begun = forward_loss(first, batches()[0], objective)
    step(other, batches()[3])
    ended = optimizer_step(unscale_and_clip(backward_scaled(begun), max_norm=1e9))
    assert ended.model.scale == pytest.approx(0.9)


def test_a_step_that_is_skipped_undoes_what_its_backward_pass_moved():
    state = reduce(step, batches()[:2], TrainState.create(InBackward(HOOKS["backward hook"]), SGD))
    before = state.model.scale
    state = step(state, (torch.full((8, 2), float("nan")), batches()[0][1]))
    assert not state.finite
    assert state.model.scale == before


def test_a_value_of_the_class_is_refused_and_one_that_stays_is_not():
    class Counting(Net):
        calls, scale, table = 0, 2.0, [1, 2]

    def count(net, x):
        Counting.calls += 1
        return Counting.scale

    state = TrainState.create(Counting(None, count), SGD)
    with pytest.raises(
        ConfigError, match=r"changes class Counting\.calls, a value that all modules of the class share, in"
    ):
        step(state, batches()[0])
    still = TrainState.create(Counting(None, lambda net, x: Counting.scale), SGD)
    assert reduce(step, batches(), still).step == 6


def test_a_list_that_outgrows_a_state_is_refused_and_not_begun_anew(monkeypatch):
    monkeypatch.setattr(plain_attributes, "MOST_ITEMS", 4)
    monkeypatch.setattr(attribute_marks, "MOST_ITEMS", 4)
    state = TrainState.create(Net([], lambda net, x: net.kept.append(1.0) or len(net.kept)), SGD)
    state = reduce(step, batches()[:4], state)
    with pytest.raises(ConfigError, match="put more than 4 items into kept, which belongs to the state"):
        step(state, batches()[4])


def test_a_text_that_a_library_writes_into_a_setting_is_none_of_the_state():
    def chosen(net, x):
        net.kept.kind = "chosen"
        return 1.0

    state = step(TrainState.create(Net(SimpleNamespace(kind=None), chosen), SGD), batches()[0])
    assert not state.tensors.extra


class Teacher(nn.Module):
    """A student, and a frozen teacher that begins as its copy and follows it from a pass on."""

    def __init__(self, begins=0):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Linear(2, 2)
        self.teacher = copy.deepcopy(self.student).requires_grad_(requires_grad=False)
        self.begins, self.passes = begins, 0

    def forward(self, x):
        with torch.no_grad():
            for slow, quick in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                if self.passes >= self.begins:
                    slow.lerp_(quick, 0.1)
        self.passes += self.training
        return self.student(x) + self.teacher(x)


@pytest.mark.parametrize("begins", [0, 2, 4])
def test_a_teacher_that_begins_as_a_copy_or_follows_later_belongs_to_the_state(begins):
    net = Teacher(begins)
    sgd = torch.optim.SGD(net.student.parameters(), lr=0.05, momentum=0.9)
    state = TrainState.create(Teacher(begins), SGD)
    for batch in batches():
        sgd.zero_grad()
        objective(net, batch).backward()
        sgd.step()
        state = step(state, batch)
        before = {name: value.clone() for name, value in state.params.items()}
        evaluate(state, batches(2), objective)
        assert all(torch.equal(value, before[name]) for name, value in state.params.items())
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), state.params.values(), strict=True))
    spoiled = (torch.full((8, 2), float("nan")), batches()[0][1])
    skipped = step(state, spoiled)
    assert all(torch.equal(value, before[name]) for name, value in skipped.params.items())


# -- modules beside the model -----------------------------------------------------------------------------------------


class Centred(nn.Module):
    """A loss around a running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, outputs, targets):
        with torch.no_grad():
            self.mean.lerp_(outputs.mean(0), 0.1)
        return F.mse_loss(outputs - self.mean, targets)


class Judge:
    """An objective that is an object."""

    def __init__(self, criterion):
        self.parts = {"loss": criterion}

    def __call__(self, model, batch):
        return self.parts["loss"](model(batch[0]), batch[1])


def judged(model, batch, criterion):
    return criterion(model(batch[0]), batch[1])


@pytest.mark.parametrize(
    "wrap", [Judge, lambda c: partial(judged, criterion=c), lambda c: lambda m, b: judged(m, b, c)]
)
def test_a_loss_that_keeps_a_buffer_outside_of_the_model_is_refused_and_in_the_model_it_is_held(
    wrap, tmp_path
):
    state = TrainState.create(nn.Linear(2, 2), SGD)
    with pytest.raises(
        ConfigError, match="changes the buffer mean of a Centred that is no part of the model"
    ):
        forward_loss(state, batches()[0], wrap(Centred()))
    forward_loss(state, batches()[0], wrap(nn.CrossEntropyLoss(torch.ones(2))))

    def begin():
        torch.manual_seed(0)
        model = nn.ModuleDict({"net": nn.Linear(2, 2), "criterion": Centred()})
        return TrainState.create(model, SGD)

    def trained(state, batch):
        inside = wrap(state.model["criterion"])
        state = forward_loss(state, batch, lambda model, batch: inside(model["net"], batch))
        return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1e9))

    whole = reduce(trained, batches(), begin())
    checkpoint.save(reduce(trained, batches()[:3], begin()), tmp_path / "half")
    ended = reduce(trained, batches()[3:], checkpoint.load(tmp_path / "half", like=begin()))
    assert torch.equal(whole.buffers["criterion.mean"], ended.buffers["criterion.mean"])


def test_the_module_of_another_state_and_one_that_somebody_trains_may_change_in_an_objective():
    critic = TrainState.create(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), SGD)
    trained = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = TrainState.create(nn.Linear(2, 2), SGD)
    for other in (critic.model, trained):
        forward_loss(
            state, batches()[0], partial(judged, criterion=lambda o, _, other=other: other(o).square().mean())
        )
        assert other[1].num_batches_tracked == 1
