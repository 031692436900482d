"""A recipe whose steps take parts: dropout, BatchNorm, augmentation, averages; what the tests of runs on ranks train."""

import time

import attrs
import points_recipe
import torch

from steploop import (
    accuracy,
    backward_scaled,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.data import Loader


@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 2
    seed: int = 0
    samples: int = 48
    batch_size: int = 8
    learning_rate: float = 0.1
    patience: int = 10
    step_s: float = 0.0  # how long a step takes at least
    eval_s: float = 0.0  # likewise an evaluation's batch


def build(config, device):
    names = ("epochs", "seed", "learning_rate", "patience", "eval_s")
    points = points_recipe.Config(
        samples=config.samples, precision="fp32", **{name: getattr(config, name) for name in names}
    )
    recipe = points_recipe.build(points, device)
    batches = Loader(
        points_recipe.Points(config.samples, 1),
        batch_size=config.batch_size,
        seed=config.seed,
        augment=points_recipe.add_noise,
    )

    def train_step(state, batch):
        time.sleep(config.step_s)
        state = forward_loss(state, batch, points_recipe.objective)
        state = unscale_and_clip(backward_scaled(state), max_norm=1.0)
        state = update_ema(optimizer_step(state), decay=0.8)
        return schedule(state, lambda step: config.learning_rate / (1 + step / 10))

    torch.manual_seed(0)
    return attrs.evolve(recipe, batches=batches, train_step=train_step, train_metrics={"accuracy": accuracy})
