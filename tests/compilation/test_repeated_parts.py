"""Updates that are there once for each parameter are one kernel: what they compute stays the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compiled_runs import assert_alike, folded, needs_compiler
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    backward_scaled,
    compile,  # noqa: A004  (steploop.compile, as in torch.compile)
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.compilation import compiled_step, kept_graphs
from steploop.compilation.repeated_parts import in_parts, split_repeated
from steploop.testing.state_comparison import require_same


class Deep(nn.Module):
    """Parameters of many shapes: one of a single number, one that is large, one that is frozen, one of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.large = nn.Linear(64, 600)
        self.back = nn.Linear(600, 8)
        self.rest = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(5)])
        self.scale = nn.Parameter(torch.ones(()))
        self.one = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        x = self.back(torch.tanh(self.large(self.conv(x).flatten(1))))
        for part in self.rest:
            x = x + torch.tanh(part(x)) * self.scale
        return x * self.one * self.frozen


def objective(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def step(state, batch):
    state = backward_scaled(forward_loss(state, batch, objective))
    state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
    return schedule(update_ema(state, decay=0.9), lambda n: 0.02 / (1 + n))


def given(count=5, *, bad=()):
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(6, 2, 4, 4, generator=generator), torch.randint(0, 8, (6,), generator=generator))
        for _ in range(count)
    ]
    return [(x * float("inf") if i in bad else x, y) for i, (x, y) in enumerate(made)]


def first(optimizer, *, precision="fp32", channels_last=False):
    scale = LossScale(scale=2.0**8, growth_interval=3) if precision == "fp16" else None
    return TrainState.create(
        Deep(), optimizer, precision=precision, ema=True, loss_scale=scale,
        memory_format=torch.channels_last if channels_last else None,
    )  # fmt: skip


def interpreted(monkeypatch, *, split):
    """Run graphs as they are, whole or in parts; give the numbers of parts."""
    counts = []

    def compile_graph(graph, mode):
        module = copy.deepcopy(graph.module)
        found = split_repeated(module) if split else None
        if found is None:
            counts.append(0)
            return lambda inputs: module(*inputs)
        split_up, modules = found
        counts.append(len(split_up.parts))
        kernels = [lambda inputs, one=one: one(*inputs) for one in modules]
        return in_parts(split_up, lambda inputs: module(*inputs), kernels)

    monkeypatch.setattr(compiled_step, "compile_graph", compile_graph)
    return counts


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "plain sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {}),
    "maximized": (torch.optim.AdamW, {"maximize": True}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rprop": (torch.optim.Rprop, {}),
}


@pytest.mark.parametrize(
    ("name", "precision", "channels_last"),
    [*((name, "fp32", False) for name in OPTIMIZERS), ("sgd", "fp16", True), ("adamw", "fp16", True)],
)
def test_parts_compute_what_the_whole_computes(monkeypatch, name, precision, channels_last):
    """Bit for bit, over steps that are skipped, an average and a schedule."""
    kind, hyper = OPTIMIZERS[name]
    state = first(Optimizer(kind, lr=0.02, **hyper), precision=precision, channels_last=channels_last)
    batches = given(bad=(2,) if precision == "fp16" else ())
    ends = []
    for split in (False, True):
        counts = interpreted(monkeypatch, split=split)
        ends.append(folded(compile(step), state.clone(), batches))
        assert bool(max(counts)) is split
    whole, parts = ends
    require_same(parts, whole, "in parts it is the same")
    assert parts.applied_steps == (4 if precision == "fp16" else 5)


def test_a_step_of_few_parameters_stays_whole(monkeypatch):
    counts = interpreted(monkeypatch, split=True)
    state = TrainState.create(
        nn.Sequential(nn.Flatten(), nn.Linear(32, 8)), Optimizer(torch.optim.AdamW), ema=True
    )
    folded(compile(step), state, given())
    assert counts == [0]


@needs_compiler
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_compiled_parts_agree_with_eager(name):
    kind, hyper = OPTIMIZERS[name]
    state = first(Optimizer(kind, lr=0.02, **hyper), precision="fp16", channels_last=True)
    batches = given(8, bad=(2, 5))
    fast = compile(step)
    eager, compiled = folded(step, state.clone(), batches), folded(fast, state.clone(), batches)
    assert eager.applied_steps == compiled.applied_steps == 6
    assert fast.figures.form == "compiled"
    assert_alike(eager, compiled, 3e-2)


@needs_compiler
def test_compiled_parts_agree_closely_in_float32_and_are_found_again(monkeypatch):
    """What is found again computes the same bits."""
    monkeypatch.setattr(kept_graphs, "find", lambda key: None)
    state = first(Optimizer(torch.optim.AdamW, lr=0.02))
    batches = given(8)
    fast = compile(step)
    compiled = folded(fast, state.clone(), batches)
    assert_alike(folded(step, state.clone(), batches), compiled, 1e-4)
    (graph,) = fast._store.all()
    assert graph.run.__module__ == "steploop.compilation.repeated_parts"
    monkeypatch.undo()
    again = compile(step)
    require_same(folded(again, state.clone(), batches), compiled, "found again it is the same")
    (graph,) = again._store.all()
    assert graph.plan.graph.kept is not None
    assert graph.run.__module__ == "steploop.compilation.repeated_parts"
