"""Momentum contrast: the key encoder is an average of the query encoder, and its keys wait in a queue."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    fold_in,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
    update_ema,
)

SEED, STEPS, QUEUE, TEMPERATURE, DECAY = 19, 20, 64, 0.2, 0.9


def encoder():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))


def first_queue():
    return F.normalize(torch.randn(QUEUE, 8, generator=torch.Generator().manual_seed(SEED)), dim=1)


def contrast(encode_query, encode_key, x, queue):
    """The query of each sample is to find its own key among those of the queue; two views, made by noise."""
    queries = F.normalize(encode_query(x + 0.3 * torch.randn_like(x)), dim=1)
    with torch.no_grad():
        keys = F.normalize(encode_key(x + 0.3 * torch.randn_like(x)), dim=1)
    positive, negative = (queries * keys).sum(1, keepdim=True), queries @ queue.T
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), keys


def batches():
    generator = torch.Generator().manual_seed(18)
    return [torch.randn(16, 12, generator=generator) for _ in range(STEPS)]


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


def by_hand(data):
    query, key, queue = encoder(), encoder().requires_grad_(requires_grad=False), first_queue()
    optimizer = torch.optim.SGD(query.parameters(), **SGD)
    for step, x in enumerate(data):
        torch.manual_seed(fold_in(SEED, step, 0))
        optimizer.zero_grad()
        loss, keys = contrast(query, key, x, queue)
        loss.backward()
        optimizer.step()
        for k, q in zip(key.parameters(), query.parameters(), strict=True):
            k.lerp_(q.detach(), 1 - DECAY)
        queue = torch.cat([keys, queue])[:QUEUE]
    return {**query.state_dict(), **{f"key {n}": k for n, k in key.state_dict().items()}, "queue": queue}


def objective(model, x, *, averages, queue):
    loss, keys = contrast(model, partial(functional_call, model, averages), x, queue)
    return loss, torch.cat([keys, queue])[:QUEUE]


def initial():
    optimizer = Optimizer(torch.optim.SGD, **SGD)
    return TrainState.create(encoder(), optimizer, seed=SEED, ema=True, carry=first_queue())


def train_step(state, x):
    state = forward_loss(state, x, partial(objective, averages=dict(state.ema), queue=state.carry))
    state = state.with_carry(state.outputs)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=float("inf"))
    return update_ema(optimizer_step(state), decay=DECAY)


def result(state):
    return {**state.params, **{f"key {n}": k for n, k in state.ema.items()}, "queue": state.carry}
