"""A variational autoencoder: noise inside the loss, Adam, one cycle of the rate, clipped gradients."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    fold_in,
    forward_loss,
    from_torch,
    optimizer_step,
    schedule,
    unscale_and_clip,
)

SEED, STEPS = 11, 20


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(SEED)
        self.encoder = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16))

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance


def elbo(model, x):
    logits, mean, log_variance = model(x)
    reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp())
    return (reconstruction + divergence) / len(x)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(32, 16, generator=generator).round() for _ in range(STEPS)]


def cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.01, total_steps=STEPS + 1)


def by_hand(data):
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = cycle(optimizer)
    for step, x in enumerate(data):
        torch.manual_seed(fold_in(SEED, step, 0))
        optimizer.zero_grad()
        loss = elbo(model, x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model.state_dict()


RATES = from_torch(cycle, STEPS + 1, lr=0.01)


def initial():
    state = TrainState.create(Autoencoder(), Optimizer(torch.optim.Adam, lr=0.01), seed=SEED)
    return schedule(state, RATES)


def train_step(state, x):
    state = forward_loss(state, x, elbo)
    state = backward_scaled(state)
    state = unscale_and_clip(state, max_norm=1.0)
    state = optimizer_step(state)
    return schedule(state, RATES)
