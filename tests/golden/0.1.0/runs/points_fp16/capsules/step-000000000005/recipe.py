"""A classifier of random points with everything a resume has to restore: the recipe of the tests of the run."""

import time
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    EarlyStopping,
    LossScale,
    Optimizer,
    ReduceLROnPlateau,
    TrainState,
    accumulate,
    accuracy,
    evaluate,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.data.loader import Loader
from steploop.recipe import Recipe


@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 2
    seed: int = 0
    learning_rate: float = 0.1
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    widths: tuple[int, ...] = (8,)
    samples: int = 28
    workers: int = 0
    patience: int = 10
    eval_every: int | None = None
    plateau: bool = False
    phases: bool = False
    step_s: float = 0.0  # how long a step takes at least
    eval_s: float = 0.0  # likewise an evaluation's batch
    data_s: float = 0.0  # likewise a sample, in its worker
    explode_at: int = -1  # from this attempted step on, the loss is not finite
    name: str = "points"


class Points(torch.utils.data.Dataset):
    def __init__(self, n, seed, wait_s=0.0):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.wait_s = wait_s

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        time.sleep(self.wait_s)
        return self.x[index], self.y[index]


def add_noise(batch, generator):
    x, y = batch
    return x + 0.1 * torch.randn(x.shape, generator=generator), y


def objective(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"logits": logits}


def build(config, device):
    torch.manual_seed(config.seed)
    layers, inner = [], 6
    for width in config.widths:
        layers += [nn.Linear(inner, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2)]
        inner = width
    model = nn.Sequential(*layers, nn.Linear(inner, 2))
    batches = Loader(
        Points(config.samples, 1, config.data_s), batch_size=4, seed=config.seed, num_workers=config.workers,
        augment=add_noise,
    )  # fmt: skip
    test = Loader(Points(20, 2), batch_size=6, seed=0, shuffle=False)
    rate = one_cycle(config.learning_rate, total_steps=max(config.epochs, 1) * len(batches))

    def exploding(model, batch):
        loss, outputs = objective(model, batch)
        return loss * torch.tensor(float("inf")), outputs

    def train_step(state, batch):
        time.sleep(config.step_s)
        broken = 0 <= config.explode_at <= state.attempted_steps
        parts = [tuple(t[:2] for t in batch), tuple(t[2:] for t in batch)]
        state = accumulate(state, parts, exploding if broken else objective)
        state = unscale_and_clip(state, max_norm=1.0)
        state = optimizer_step(state, max_nonfinite_steps=3)
        state = update_ema(state, decay=0.8)
        return schedule(state, (lambda _: state.plateau.learning_rate) if config.plateau else rate)

    def measure(state):
        def waiting(model, batch):
            time.sleep(config.eval_s)
            return objective(model, batch)

        return evaluate(state, test, waiting, {"accuracy": accuracy}, use_ema=True)

    scale = LossScale(scale=2.0**12, growth_interval=3) if config.precision == "fp16" else None
    state = TrainState.create(
        model, Optimizer(torch.optim.AdamW, lr=config.learning_rate), seed=config.seed, precision=config.precision,
        device=device, ema=True, loss_scale=scale,
    )  # fmt: skip
    recipe = Recipe(
        state=schedule(state, rate),
        train_step=train_step,
        batches=batches,
        epochs=config.epochs,
        evaluate=measure,
        monitor="loss",
        early_stopping=EarlyStopping(patience=config.patience),
        plateau=ReduceLROnPlateau(lr=config.learning_rate, patience=0) if config.plateau else None,
        eval_every_steps=config.eval_every,
        data=f"{config.samples} random points",
    )
    if config.phases:
        second = attrs.evolve(config, phases=False, seed=config.seed + 1)
        recipe = attrs.evolve(recipe, then=lambda _: build(second, device))
    return recipe
