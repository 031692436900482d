"""One compiled step for runs of different models: each is computed by its own graphs."""

import torch
import torch.nn.functional as F
from torch import nn

import steploop
from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)


def train_step(state, batch):
    state = forward_loss(state, batch, lambda model, b: F.mse_loss(model(b[0]), b[1]))
    state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
    return schedule(state, lambda step: 0.1 / (1 + step))


def batch(size):
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, generator=generator), torch.randn(size, 2, generator=generator)


def first(width):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    return TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))


def test_a_graph_never_runs_on_the_states_of_another_model():
    """The second model comes with a form of batch for which only the first one has a graph."""
    fast = steploop.compile(train_step)
    ends = {}
    for step in (fast, train_step):
        narrow, wide = first(8), first(16)
        for _ in range(3):
            narrow = step(narrow, batch(5))
        for size in (6, 6, 6, 6, 5, 5, 6):
            wide = step(wide, batch(size))
        narrow = step(narrow, batch(5))
        ends[step is fast] = {**narrow.params, **{f"wide.{n}": p for n, p in wide.params.items()}}
    for name, param in ends[False].items():
        torch.testing.assert_close(ends[True][name], param, rtol=1e-5, atol=1e-6, msg=name)
