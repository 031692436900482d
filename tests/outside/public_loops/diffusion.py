"""Denoising diffusion: noise and moments drawn inside the loss, two micro-batches, float16, an average every third step."""

import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    LossScale,
    Optimizer,
    TrainState,
    accumulate,
    fold_in,
    optimizer_step,
    unscale_and_clip,
    update_ema,
)

SEED, STEPS, MOMENTS, EVERY, DECAY = 3, 20, 50, 3, 0.9
KEPT = torch.cumprod(1 - torch.linspace(1e-3, 0.2, MOMENTS), dim=0)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.time = nn.Embedding(MOMENTS, 16)
        self.first, self.middle, self.last = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x, moments):
        hidden = F.silu(self.first(x) + self.time(moments))
        return self.last(hidden + F.silu(self.middle(hidden)))


def denoising(model, x):
    moments = torch.randint(MOMENTS, (len(x),))
    noise = torch.randn_like(x)
    kept = KEPT[moments].unsqueeze(1)
    return F.mse_loss(model(kept.sqrt() * x + (1 - kept).sqrt() * noise, moments), noise)


def batches():
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(24, 2, generator=generator) for _ in range(2)] for _ in range(STEPS)]


def by_hand(data):
    model = Denoiser()
    averages = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=4)
    step = 0
    for attempt, parts in enumerate(data):
        optimizer.zero_grad()
        for number, part in enumerate(parts):
            torch.manual_seed(fold_in(SEED, attempt, number))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = denoising(model, part)
            scaler.scale(loss / len(parts)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            continue
        step += 1
        if step % EVERY == 0:
            for name, p in model.named_parameters():
                averages[name].lerp_(p.detach(), 1 - DECAY)
    return {**model.state_dict(), **{f"average of {n}": a for n, a in averages.items()}}


def initial():
    scale = LossScale(scale=2.0**17, growth_interval=4)
    optimizer = Optimizer(torch.optim.Adam, lr=0.01)
    return TrainState.create(Denoiser(), optimizer, seed=SEED, precision="fp16", loss_scale=scale, ema=True)


def train_step(state, parts):
    state = accumulate(state, parts, denoising)
    state = unscale_and_clip(state, max_norm=1.0)
    state = optimizer_step(state)
    return update_ema(state, decay=lambda step: 1.0 if step % EVERY else DECAY)


def result(state):
    return {**state.params, **state.buffers, **{f"average of {n}": a for n, a in state.ema.items()}}
