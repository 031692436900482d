"""Rows of three numbers, a loss, a step and a loop by hand: what the tests of modules share."""

import torch
from torch import nn

from steploop import Optimizer, TrainState, backward_scaled, forward_loss, optimizer_step, unscale_and_clip

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
    plain = {
        f"{n}.{key}".removeprefix("."): value
        for n, m in model.named_modules()
        if type(m).get_extra_state is nn.Module.get_extra_state
        for key, value in vars(m).items()
        if key in {"calls", "factor", "hidden", "sums", "mean"}
    }
    return {"tensors": named, "extra": {**extra, **plain}}


def values_in(state):
    return {"tensors": {**state.params, **state.buffers}, "extra": state.tensors.extra}


def create(make, *, other=False, **options):
    return TrainState.create(made(make, other=other), SGD, **options)
