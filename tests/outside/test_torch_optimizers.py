"""Every optimizer of torch, with every set of hyperparameters of its own test database, trains as in a loop by hand."""

import copy
import sys
import warnings
from collections import Counter
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves
from torch_databases import optim_db

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    checkpoint,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.errors import SteploopError

STEPS = 5
EXCUSED = ("torch refuses it", "diverges by hand")


class Tables(nn.Module):
    """Two tables of vectors with sparse gradients, for what takes no others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3, sparse=True)

    def forward(self, x):
        rows = x[:, :2].abs().long() % 6
        return (self.first(rows) * self.last(rows)).sum((1, 2)).unsqueeze(1)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))
        self.last = nn.Parameter(torch.randn(5, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.first @ self.last).abs()


class Perceptron(nn.Module):
    def __init__(self, *, bias=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, bias=bias), nn.Linear(5, 2, bias=bias)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def model_of(info, variant):
    torch.manual_seed(3)
    if info.only_supports_sparse_grads:
        return Tables()
    if variant == "complex":
        return Complex()
    return Perceptron(bias=info.name != "Muon")  # Muon takes matrices only


def batches():
    generator = torch.Generator().manual_seed(4)
    return [
        (3 * torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator))
        for _ in range(STEPS)
    ]


def loss_of(model, batch):
    output = model(batch[0])
    return F.mse_loss(output, batch[1][:, : output.shape[1]])


def factor(step):
    return 1.0 / (1 + 0.3 * step)


def variants(info):
    """Ways to use an optimizer, besides the sets of hyperparameters."""
    yield "plain", {}
    if not info.step_requires_closure:
        yield "scheduled", {}
        yield "groups", {}
    if "foreach" in info.supported_impls:
        yield "foreach", {"foreach": True}
    if "fused" in info.supported_impls and "cpu" in info.supports_fused_on:
        yield "fused", {"fused": True}
    if info.supports_complex:
        yield "complex", {}


def by_hand(info, hyper, variant, data):
    """The parameters and the optimizer's state after all steps; a text where torch refuses, or where the run diverges."""
    model = model_of(info, variant)
    params = list(model.parameters())
    if variant == "groups":
        first, last = list(model.first.parameters()), list(model.last.parameters())
        params = [{"params": first}, {"params": last, "lr": 0.5 * hyper.get("lr", 0.01)}]
        hyper = {"lr": 0.01, **hyper}
    try:
        optimizer = info.optim_cls(params, **hyper)
        scheduler = LambdaLR(optimizer, factor) if variant == "scheduled" else None
        for batch in data:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            if info.step_requires_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
    except (RuntimeError, ValueError):
        return "torch refuses it"
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "diverges by hand"  # ours takes no step that is not finite
    return kept({name: (p, optimizer.state.get(p, {})) for name, p in model.named_parameters()})


def kept(values):
    """name -> the parameter, and what the optimizer keeps for it, in one order."""
    return {name: (p.detach(), dict(sorted(slots.items()))) for name, (p, slots) in values.items()}


def first_state(info, hyper, variant):
    groups = []
    if variant == "groups":
        groups = [("last*", {"lr": 0.5 * hyper.get("lr", 0.01)})]
        hyper = {"lr": 0.01, **hyper}
    state = TrainState.create(
        model_of(info, variant), Optimizer(info.optim_cls, groups=groups, **copy.deepcopy(hyper))
    )
    return scheduled(info, state, hyper) if variant == "scheduled" else state


def scheduled(info, state, hyper):
    usual = info.optim_cls([nn.Parameter(torch.zeros(2, 2))]).defaults["lr"]
    return schedule(state, lambda step: float(hyper.get("lr", usual)) * factor(step))


def with_our_steps(info, hyper, variant, data):
    """The same, with a checkpoint after the second step and without."""

    def gradients(state, batch):
        return unscale_and_clip(backward_scaled(forward_loss(state, batch, loss_of)), max_norm=float("inf"))

    def step(state, batch):
        state = gradients(state, batch)
        if info.step_requires_closure:
            return optimizer_step(state, closure=lambda s: gradients(s, batch))
        state = optimizer_step(state)
        return scheduled(info, state, hyper) if variant == "scheduled" else state

    state = reduce(step, data[:2], first_state(info, hyper, variant))
    with TemporaryDirectory() as folder:
        checkpoint.save(state, Path(folder) / "second", require_finite=False)
        resumed = checkpoint.load(Path(folder) / "second", like=first_state(info, hyper, variant))
    for begun in (state, resumed):
        end = reduce(step, data[2:], begun)
        yield kept({name: (p, end.slots[name]) for name, p in end.params.items()})


def same(found, expected):
    """Parameters, and every tensor and number that the optimizer keeps."""
    left, right = tree_leaves(found), tree_leaves(expected)
    return len(left) == len(right) and all(
        torch.equal(a, b)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else type(a) is type(b)
        for a, b in zip(left, right, strict=True)
    )


def judge(info):
    """description -> "equal", "unequal", what torch says of it, or why our steps refuse it."""
    data, verdicts = batches(), {}
    for number, sample in enumerate(info.optim_inputs_func(device="cpu")):
        for variant, options in variants(info):
            hyper = {**sample.kwargs, **options}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = by_hand(info, copy.deepcopy(hyper), variant, data)
                if isinstance(expected, str):
                    verdict = expected
                else:
                    try:
                        found = list(with_our_steps(info, copy.deepcopy(hyper), variant, data))
                        verdict = "equal" if all(same(f, expected) for f in found) else "unequal"
                    except SteploopError as error:
                        verdict = f"refused: {type(error).__name__}: {error}"
            verdicts[f"{info.name} {number} {sample.desc}, {variant}"] = verdict
    return verdicts


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.name)
def test_every_set_of_hyperparameters_trains_and_resumes_as_in_a_loop_by_hand(info):
    """Five steps, the last three also from a checkpoint; parameters and the optimizer's state bit for bit."""
    verdicts = judge(info)
    assert Counter(verdicts.values())["equal"] > 0
    assert {k: v for k, v in verdicts.items() if v not in {"equal", *EXCUSED}} == {}


if __name__ == "__main__":
    every = [(name, verdict) for info in optim_db for name, verdict in judge(info).items()]
    lines = [str(Counter(verdict.split(":")[0] for _, verdict in every))]
    lines += [f"{name}: {verdict}" for name, verdict in every if verdict != "equal"]
    sys.stdout.write("\n".join(lines) + "\n")
