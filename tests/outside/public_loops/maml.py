"""MAML: an inner gradient step for each task, differentiated through by the outer one."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)

SEED, STEPS, INNER_RATE = 9, 20, 0.05


def network():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def adapted_loss(model, tasks):
    """The mean loss on each task's queries after one gradient step on its support."""
    losses = []
    for support, query in tasks:
        params = dict(model.named_parameters())
        inner = F.mse_loss(functional_call(model, params, support[0]), support[1])
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {name: p - INNER_RATE * g for (name, p), g in zip(params.items(), grads, strict=True)}
        losses.append(F.mse_loss(functional_call(model, fast, query[0]), query[1]))
    return torch.stack(losses).mean()


def batches():
    generator = torch.Generator().manual_seed(8)

    def task():
        amplitude, phase = torch.rand(2, generator=generator)
        x = 10 * torch.rand(2, 10, 1, generator=generator) - 5
        y = (0.5 + 4 * amplitude) * torch.sin(x + 3 * phase)
        return (x[0], y[0]), (x[1], y[1])

    return [[task() for _ in range(3)] for _ in range(STEPS)]


def by_hand(data):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for tasks in data:
        optimizer.zero_grad()
        adapted_loss(model, tasks).backward()
        optimizer.step()
    return model.state_dict()


def initial():
    return TrainState.create(network(), Optimizer(torch.optim.Adam, lr=1e-2), seed=SEED)


def train_step(state, tasks):
    state = forward_loss(state, tasks, adapted_loss)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=float("inf"))
    return optimizer_step(state)
