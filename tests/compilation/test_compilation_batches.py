"""Batches of every kind: compiled as in eager, or refused with the place and what to do; never built in, never kept."""

import dataclasses
import enum
import gc
import weakref
from collections import UserDict
from fractions import Fraction
from typing import NamedTuple

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, batches, first_state, folded, run_as_it_is
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.errors import CompileError


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


@attrs.frozen
class Attrs:
    x: torch.Tensor
    y: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Plain:
    def __init__(self, x, y):
        self.x, self.y = x, y


def read(batch):
    if isinstance(batch, (dict, UserDict)):
        return batch["x"], batch["y"]
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "x"):
        return batch[0], batch[1]
    return batch.x, batch.y


def loss(model, batch):
    x, y = read(batch)
    return F.cross_entropy(model(x), y)


def step(state, batch):
    return optimizer_step(unscale_and_clip(backward_scaled(forward_loss(state, batch, loss)), max_norm=1.0))


KINDS = {
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "user dict": lambda x, y: UserDict(x=x, y=y),
    "dataclass": Data,
    "frozen": Frozen,
    "attrs": Attrs,
    "named tuple": Pair,
    "plain values": lambda x, y: (x, y, "a", b"b", True, None, 1 + 2j, Color.RED, torch.float32, {"k": 3}),
    "imaginary part": lambda x, y: (torch.complex(-x, -x).conj().imag, y),
    "conjugate": lambda x, y: (x, y, torch.complex(x, x).conj()),
    "twice": lambda x, y: (x, y, x, x[:2]),
    "expanded": lambda x, y: (x[:1].expand(10, 6), y),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_containers_of_tensors_are_read_anew_at_every_step(kind):
    given = [KINDS[kind](x, y) for x, y in batches(6)]
    state, fast = first_state(), compile(step)
    assert_alike(folded(step, state.clone(), given), folded(fast, state, given), 1e-5)
    assert len(fast.figures.compile_s) == 1


def test_conjugates_and_others_take_turns():
    def with_complex(model, batch):
        z = batch[2] * batch[2]
        return loss(model, batch) * (1 + 0.1 * torch.view_as_real(z).sum().tanh())

    def one(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, with_complex)), max_norm=1.0)
        )

    given = [
        (x, y, torch.complex(x, 2 * x).conj() if i % 2 else torch.complex(x, x))
        for i, (x, y) in enumerate(batches(6))
    ]
    state = first_state()
    assert_alike(folded(one, state.clone(), given), folded(compile(one), state, given), 1e-5)


REFUSED = {
    "object": (Plain, r"'batch' is a .*Plain"),
    "NumPy array": (lambda x, y: (x, y, np.ones(3)), r"'batch\.2' is a numpy\.ndarray\. Make it a tensor"),
    "NumPy number": (lambda x, y: (x, y, np.float32(1)), r"'batch\.2' is a numpy\.float32"),
    "set": (lambda x, y: {"x": x, "y": y, "s": {1}}, r"'batch\.s' is a set"),
    "fraction": (lambda x, y: (x, y, Fraction(1, 2)), r"'batch\.2' is a fractions\.Fraction"),
    "function": (lambda x, y: (x, y, len), r"'batch\.2' is a builtin_function"),
    "object as a key": (lambda x, y: {"x": x, "y": y, Plain(1, 2): 1}, r"'batch\[Plain\]'"),
    "sparse": (lambda x, y: (x, y, x.to_sparse()), r"'batch\.2' is sparse_coo.*to_dense\(\)"),
    "csr": (lambda x, y: (x.to_sparse_csr(), y), r"'batch\.0' is sparse_csr"),
    "gradient": (lambda x, y: (x.clone().requires_grad_(), y), r"'batch\.0' requires a gradient"),
    "parameter": (lambda x, y: (nn.Parameter(x), y), r"'batch\.0' requires a gradient"),
    "class of its own": (lambda x, y: (x.as_subclass(type("Image", (torch.Tensor,), {})), y), r"'batch\.0' is a Image"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_anything_else_is_refused_by_its_place_and_auto_goes_on_in_eager(kind):
    make, message = REFUSED[kind]
    given = [make(x, y) for x, y in batches(4)]
    usable = kind not in {"sparse", "csr", "gradient", "parameter"}
    state = folded(step, first_state(), batches(1))
    with pytest.raises(CompileError, match=message):
        compile(step)(state, given[0])
    said = []
    fast = compile(step, mode="auto", report=said.append)
    if usable:
        twin = state.clone()
        assert_alike(folded(step, twin, given), folded(fast, state, given), 0.0)
        assert len(said) == 1
        assert "goes on in eager for batches of this form; the step cannot be compiled" in said[0]


def test_auto_gives_up_one_form_of_batch_and_compiles_the_others(monkeypatch):
    from steploop.compilation import compiled_step

    monkeypatch.setattr(compiled_step, "measure", lambda forms, state, batch: {"eager": 2.0, "compiled": 1.0})
    said, good = [], batches(6)
    fast = compile(step, mode="auto", report=said.append)
    state = folded(fast, first_state(), [b for x, y in good for b in ((x, y), (x, y, {1}))])
    assert state.step == 12
    assert fast.figures.form == "compiled"
    assert sum("goes on in eager for batches of this form" in line for line in said) == 1


def test_batches_are_not_kept_alive():
    fast, references = compile(step), []
    state = folded(fast, first_state(), batches(3))
    for x, y in batches(5):
        held = Data(x.clone(), y)
        references += [weakref.ref(held), weakref.ref(held.x)]
        state = fast(state, held)
        del held
    gc.collect()
    assert sum(r() is not None for r in references) == 0


def test_a_batch_that_the_step_changes_is_refused():
    def changing(model, batch):
        batch[0].mul_(2)
        return loss(model, batch)

    def one(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, changing)), max_norm=1.0)
        )

    state = folded(step, first_state(), batches(1))
    with pytest.raises(CompileError, match=r"changes a tensor of the batch in place\. Work on a copy"):
        compile(one)(state, batches(1)[0])


def test_a_carry_that_is_a_tensor_of_a_batch_leaves_the_batch_alone():
    def one(state, batch):
        last = state.carry["last"]

        def pulled(model, b):
            return loss(model, b) + 0.1 * (model(b[0]) - model(last)).square().mean()

        state = optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, pulled)), max_norm=1.0)
        )
        return state.with_carry({"last": batch[0]})

    given = batches(6)
    before = [x.clone() for x, _ in given]
    state = first_state(carry={"last": torch.zeros(10, 6)})
    eager, compiled = folded(one, state.clone(), given), folded(compile(one), state, given)
    assert_alike(eager, compiled, 1e-5)
    assert torch.equal(eager.carry["last"], compiled.carry["last"])
    assert all(torch.equal(x, y) for x, (y, _) in zip(before, given, strict=True))


def test_packed_sequences_are_a_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 4)

        def forward(self, packed):
            return self.layer(packed.data).mean(0, keepdim=True)

    def one(state, batch):
        return optimizer_step(
            unscale_and_clip(
                backward_scaled(forward_loss(state, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]))),
                max_norm=1.0,
            )
        )

    def pack(i):
        generator = torch.Generator().manual_seed(i)
        rows = [torch.randn(n, 3, generator=generator) for n in (4, 2, 1)]
        return nn.utils.rnn.pack_sequence(rows), torch.tensor([i % 4])

    given = [pack(i) for i in range(5)]
    state = TrainState.create(Net(), Optimizer(torch.optim.SGD, lr=0.1))
    assert_alike(folded(one, state.clone(), given), folded(compile(one), state, given), 1e-5)


def test_outputs_keep_their_classes():
    def with_outputs(model, batch):
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), Data(logits, batch[1], "kept")

    def one(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, with_outputs)), max_norm=1.0)
        )

    fast = compile(one)
    state = folded(fast, first_state(), batches(3))
    assert type(state.outputs) is Data
    assert state.outputs.x.shape == (10, 4)
    assert state.outputs.name == "kept"


def test_lengths_in_a_batch_are_built_in_where_torch_takes_numbers_only():
    def cut(model, batch):
        x, y, size, lengths = batch
        parts = model(x).split(lengths)
        return F.cross_entropy(torch.cat(parts)[:size], y[:size]) * len(parts)

    def one(state, batch):
        return optimizer_step(
            unscale_and_clip(backward_scaled(forward_loss(state, batch, cut)), max_norm=1.0)
        )

    given = [(x, y, (10, 7)[i % 2], [4, 6]) for i, (x, y) in enumerate(batches(6))]
    state, fast = first_state(), compile(one)
    assert_alike(folded(one, state.clone(), given), folded(fast, state, given), 1e-5)
    assert len(fast.figures.compile_s) == 2


def test_auto_runs_whatever_a_step_takes_for_a_state():
    def pair(states, batch):
        return tuple(step(s, batch) for s in states)

    fast = compile(pair, mode="auto")
    one, two = fast((first_state(), first_state()), batches(1)[0])
    assert one.step == two.step == 1
    with pytest.raises(
        CompileError, match="takes a TrainState or a mapping of them, but was called with a tuple"
    ):
        compile(pair)((one, two), batches(1)[0])
