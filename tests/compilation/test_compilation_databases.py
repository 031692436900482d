"""Modules and optimizers of torch's own test databases: compiled as in eager to a stated tolerance, or refused by name.

In the suite a part of them, as captured; run as a script (``compiled`` for Inductor, then names) it judges all.
"""

import contextlib
import copy
import itertools
import sys
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from compiled_runs import run_as_it_is
from module_samples import own, samples_of
from torch import nn
from torch.utils._pytree import tree_leaves
from torch_databases import module_db, optim_db

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.errors import CompileError, SteploopError

TOLERANCE = 1e-3  # of the largest entry of each tensor, after four steps in float32
SOME = 8  # one module in so many is in the suite
EXCUSED = ("equal", "refused", "not in eager")


def far(a, b):
    """The largest difference of a tensor, over its largest entry; nan equals nan."""
    gaps = [0.0]
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        if isinstance(x, torch.Tensor) and x.numel():
            x, y = (torch.nan_to_num(t.detach().to(torch.complex128)).abs() for t in (x, y))  # noqa: PLW2901
            gaps.append(float((x - y).abs().max() / x.abs().max().clamp(min=1e-3)))
    return max(gaps)


def verdict(step, state, batch):
    """Four steps of both forms from one state."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the modules themselves
        fast, compiled = compile(step), state.clone()
        try:
            for _ in range(4):
                state = step(state, batch)
        except (SteploopError, RuntimeError, ValueError, TypeError, NotImplementedError):
            return "not in eager"
        try:
            for _ in range(4):
                compiled = fast(compiled, batch)
        except CompileError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001  (said, not hidden)
            return f"FAILS: {type(error).__name__}: {error}"
        gap = far(
            [state.params, state.buffers, state.slots], [compiled.params, compiled.buffers, compiled.slots]
        )
        return "equal" if gap < TOLERANCE else f"UNEQUAL: {gap:.2g}"


def update(state):
    return optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=float("inf")))


def of_modules(info, count):
    """description -> verdict for the first samples of a module."""

    def step(state, batch):
        return update(forward_loss(state, batch, lambda model, b: model(*b)))

    found = {}
    for name, make, inputs in itertools.islice(samples_of(info), count):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = TrainState.create(make(), Optimizer(torch.optim.SGD, lr=0.01, momentum=0.9))
        except SteploopError:
            continue
        found[name] = verdict(step, state, own(inputs))
    return found


class Perceptron(nn.Module):
    def __init__(self, *, bias):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(4, 5, bias=bias), nn.Linear(5, 2, bias=bias)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def of_optimizers(info, count):
    """description -> verdict for the first sets of hyperparameters of an optimizer, and each with a schedule."""
    generator = torch.Generator().manual_seed(4)
    batch = 3 * torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    found = {}
    for number, sample in enumerate(info.optim_inputs_func(device="cpu")[:count]):
        for scheduled in (False, True):

            def step(state, batch, scheduled=scheduled):
                state = update(forward_loss(state, batch, lambda m, b: F.mse_loss(m(b[0]), b[1])))
                return schedule(state, lambda n: 0.01 / (1 + n)) if scheduled else state

            with contextlib.suppress(SteploopError, ValueError, RuntimeError):
                optimizer = Optimizer(info.optim_cls, **copy.deepcopy(sample.kwargs))
                state = TrainState.create(Perceptron(bias=info.name != "Muon"), optimizer)
                found[f"{info.name} {number} {sample.desc}, {scheduled=}"] = verdict(step, state, batch)
    return found


def bad(found):
    return {name: said for name, said in found.items() if not said.startswith(EXCUSED)}


@pytest.mark.parametrize("info", module_db[::SOME], ids=lambda info: info.name)
def test_a_module_is_captured_as_it_is_in_eager_or_refused(info, monkeypatch):
    run_as_it_is(monkeypatch)
    assert bad(of_modules(info, 1)) == {}


@pytest.mark.parametrize(
    "info", [m for m in module_db if m.name in {"nn.LSTM", "nn.GRU", "nn.RNN"}], ids=lambda info: info.name
)
def test_recurrent_layers_are_captured(info, monkeypatch):
    run_as_it_is(monkeypatch)
    assert set(of_modules(info, 2).values()) == {"equal"}


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.name)
def test_an_optimizer_is_captured_as_it_is_in_eager_or_refused(info, monkeypatch):
    run_as_it_is(monkeypatch)
    assert bad(of_optimizers(info, 2)) == {}


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    if "compiled" not in sys.argv:
        run_as_it_is(patch)
    every = {}
    for judge, infos in ((of_modules, module_db), (of_optimizers, optim_db)):
        for one in infos:
            if judge.__name__ in sys.argv or not {"of_modules", "of_optimizers"} & {*sys.argv}:
                new = judge(one, 3 if judge is of_modules else 100)
                every |= new
                sys.stdout.write("".join(f"{n}: {v[:600]}\n" for n, v in new.items() if v != "equal"))
                sys.stdout.flush()
    sys.stdout.write(f"{Counter(said.split(':')[0] for said in every.values())}\n")
