"""A small recipe without a fault: what the broken ones are made of, one change each."""

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    Optimizer,
    TrainState,
    accuracy,
    backward_scaled,
    evaluate,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.data import Loader
from steploop.recipe.recipe import Recipe

CLASSES = 4


@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 2
    seed: int = 0
    batch_size: int = 10


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.dropout(F.relu(self.norm(self.first(x)))))


class Points(torch.utils.data.Dataset):
    """Points whose class is the quadrant of their first two numbers, each moved a little when it is looked at."""

    def __init__(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 5, generator=generator)
        self.y = 2 * (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.01 * torch.randn(5), self.y[index]


def objective(model, batch):
    inputs, labels = batch
    logits = model(inputs)
    return F.cross_entropy(logits, labels), {"logits": logits}


def sound(
    config: Config, device: torch.device, *, model=None, objective: Callable = objective, **changes
) -> Recipe:
    """The recipe, with another model, objective or field of Recipe where that is given."""
    batches = Loader(Points(60, 1), batch_size=config.batch_size, seed=config.seed, device=device)
    test = Loader(Points(30, 2), batch_size=20, seed=config.seed, shuffle=False, device=device)
    learning_rate = one_cycle(0.05, total_steps=config.epochs * len(batches))

    def train_step(state, batch):
        state = forward_loss(state, batch, objective)
        state = backward_scaled(state)
        state = unscale_and_clip(state, max_norm=1.0)
        state = optimizer_step(state)
        return schedule(state, learning_rate)

    torch.manual_seed(config.seed)
    state = TrainState.create(
        model or Network(), Optimizer(torch.optim.AdamW, lr=0.05), seed=config.seed, device=device
    )
    fields = {
        "state": schedule(state, learning_rate),
        "train_step": train_step,
        "batches": batches,
        "epochs": config.epochs,
        "evaluate": lambda state: evaluate(state, test, objective, {"accuracy": accuracy}),
        "monitor": "accuracy",
        "mode": "max",
        "objective": objective,
    }
    return Recipe(**(fields | changes))


def build(config: Config, device: torch.device) -> Recipe:
    return sound(config, device)
