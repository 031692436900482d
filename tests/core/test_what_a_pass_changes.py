"""What a forward pass changes in its model: held in the state, or refused by name in the pass that shows it."""

import copy
import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from functools import reduce
from types import SimpleNamespace

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
from steploop.core.state import plain_attributes
from steploop.errors import ConfigError

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


HELD = {
    "deque": (lambda: deque(maxlen=3), queue),
    "OrderedDict": (OrderedDict, table),
    "defaultdict": (lambda: defaultdict(int), table),
    "Counter": (Counter, table),
    "number of an object": (Own, attribute),
    "tensor of an object": (Own, tensor),
    "SimpleNamespace": (lambda: SimpleNamespace(calls=0), attribute),
}


@pytest.mark.parametrize("kind", list(HELD))
def test_what_can_be_held_goes_on_in_copies_and_resumed_runs_as_in_the_loop_by_hand(kind, tmp_path):
    make, use = HELD[kind]
    net = Net(make(), use)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for batch in batches():
        sgd.zero_grad()
        objective(net, batch).backward()
        sgd.step()

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
    "a set": ((set, lambda net, x: net.kept.add(len(net.kept)) or len(net.kept)),),
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
    monkeypatch.setattr(plain_attributes, "_MOST_ITEMS", 4)
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
