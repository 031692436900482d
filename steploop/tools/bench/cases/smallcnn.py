"""A CNN of three blocks with 16, 32 and 64 channels, batch 64, AdamW.

steploop bench smallcnn
steploop bench smallcnn --set channels_last=true --set precision=bf16
"""

from typing import Literal

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

    batch_size: int = 64
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    learning_rate: float = 1e-3
    seed: int = 0


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the cross-entropy."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def block(channels_in: int, channels_out: int, pool: nn.Module) -> list[nn.Module]:
    """Make a block: convolution, BatchNorm, ReLU, pooling."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), pool]


def build(config: Config, device: torch.device) -> Recipe:
    """Build the recipe; labels come from a fixed random linear teacher."""
    torch.manual_seed(config.seed)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    x = torch.randn(16 * config.batch_size, 3, 32, 32)
    y = (x.flatten(1) @ torch.randn(3 * 32 * 32, 10)).argmax(dim=1)
    model = nn.Sequential(
        *block(3, 16, nn.MaxPool2d(2)),
        *block(16, 32, nn.MaxPool2d(2)),
        *block(32, 64, nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    rate = constant(config.learning_rate)

    def train_step(state: TrainState, batch: tuple[Tensor, Tensor]) -> TrainState:
        state = forward_loss(state, batch, objective)
        state = backward_scaled(state)
        state = unscale_and_clip(state, max_norm=1.0)
        state = optimizer_step(state)
        return schedule(state, rate)

    optimizer = Optimizer(torch.optim.AdamW, lr=config.learning_rate, weight_decay=0.01)
    return Recipe(
        state=TrainState.create(
            model,
            optimizer,
            seed=config.seed,
            precision=config.precision,
            device=device,
            memory_format=layout,
        ),
        train_step=train_step,
        batches=Loader(
            (x, y),
            batch_size=config.batch_size,
            seed=config.seed,
            augment=lambda batch, _: (batch[0].contiguous(memory_format=layout), batch[1]),
            device=device,
        ),
        epochs=1,
        objective=objective,
    )
