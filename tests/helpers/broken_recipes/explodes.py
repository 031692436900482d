"""Goes wrong at a step and in a module that its Config names: what `steploop replay` must find.

A row of zeros stands in the batch of the step ``at``. In the forward pass, ``body.normalise`` divides by its length.
In the backward pass, ``body.length`` takes the square root of 0, whose slope is infinite. In the objective, the
logarithm of 0 stands outside of every module. In the model's own code, between two modules, stands a division.
"""

from collections.abc import Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steploop import (
    Optimizer,
    TrainState,
    backward_scaled,
    evaluate,
    forward_loss,
    optimizer_step,
    unscale_and_clip,
)
from steploop.core.precision import LossScale
from steploop.recipe.recipe import Recipe

FEATURES, CLASSES = 6, 3


@attrs.frozen
class Config:
    where: str = "forward"  # forward, backward, objective, between
    at: int = 7  # the step whose batch holds the row of zeros, from 0
    epochs: int = 2
    steps: int = 10  # batches in an epoch
    batch_size: int = 8
    seed: int = 0
    precision: str = "fp32"
    loss_scale: float = 1024.0  # with precision=fp16
    momentum: float = 0.9


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x * x).sum(dim=1, keepdim=True).sqrt()


class Length(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum(dim=1, keepdim=True).sqrt()


class Body(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.project = nn.Linear(FEATURES, FEATURES, bias=False)  # zeros stay zeros
        self.normalise = Normalise() if where == "forward" else nn.Identity()
        self.length = Length() if where == "backward" else nn.Identity()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        if self.where == "between":
            x = x / x.abs().amax(dim=1, keepdim=True)
        x = self.normalise(x)
        length = self.length(x)
        return self.head(self.norm(x)) + (0.1 * length if self.where == "backward" else 0.0)


class Model(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.body = Body(where)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@attrs.frozen
class Points:
    config: Config

    def __len__(self) -> int:
        return self.config.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        for index in range(start, len(self)):
            step = epoch * len(self) + index
            draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
            x = torch.randn(self.config.batch_size, FEATURES, generator=draw)
            if step == self.config.at:
                x[5] = 0.0
            yield {"points": x, "labels": x.argmax(dim=1) % CLASSES}


def build(config: Config, device: torch.device) -> Recipe:
    torch.manual_seed(config.seed)
    model = Model(config.where)
    optimizer = Optimizer(torch.optim.SGD, lr=0.1, momentum=config.momentum)
    scale = LossScale(scale=config.loss_scale) if config.precision == "fp16" else None
    state = TrainState.create(
        model, optimizer, seed=config.seed, device=device, precision=config.precision, loss_scale=scale
    )

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        logits = model(batch["points"])
        loss = F.cross_entropy(logits, batch["labels"])
        if config.where == "objective":
            loss = loss + (batch["points"].abs().sum(dim=1) * logits[:, 0].exp()).log().mean()
        return loss, {"logits": logits}

    def train_step(state: TrainState, batch: dict[str, Tensor]) -> TrainState:
        state = forward_loss(state, batch, objective)
        state = backward_scaled(state)
        state = unscale_and_clip(state, max_norm=1.0)
        return optimizer_step(state)

    return Recipe(
        state=state,
        train_step=train_step,
        batches=Points(config),
        epochs=config.epochs,
        evaluate=lambda state: evaluate(state, [next(Points(config).epoch(1000))], objective),
        monitor="loss",
        objective=objective,
        data="points drawn from the seed, one row of zeros",
    )
