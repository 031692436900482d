"""A tiny perceptron, whose step costs little more than the loop: 32-64-10, batch 32, SGD.

steploop bench overhead
"""

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    constant,
    forward_loss,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.data.loader import Loader
from steploop.recipe.recipe import Recipe


@attrs.frozen(kw_only=True)
class Config:
    """The settings."""

    batch_size: int = 32
    hidden: int = 64
    learning_rate: float = 0.05
    threads: int = 1  # tensors this small gain nothing from more
    seed: int = 0


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the cross-entropy."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def build(config: Config, device: torch.device) -> Recipe:
    """Build the recipe; labels come from a fixed random linear teacher."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    x = torch.randn(64 * config.batch_size, 32)
    y = (x @ torch.randn(32, 10)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(32, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 10))
    rate = constant(config.learning_rate)

    def train_step(state: TrainState, batch: tuple[Tensor, Tensor]) -> TrainState:
        state = forward_loss(state, batch, objective)
        state = backward_scaled(state)
        state = unscale_and_clip(state, max_norm=1.0)
        state = optimizer_step(state)
        return schedule(state, rate)

    optimizer = Optimizer(torch.optim.SGD, lr=config.learning_rate, momentum=0.9)
    return Recipe(
        state=TrainState.create(model, optimizer, seed=config.seed, device=device),
        train_step=train_step,
        batches=Loader((x, y), batch_size=config.batch_size, seed=config.seed, device=device),
        epochs=1,
        objective=objective,
    )
