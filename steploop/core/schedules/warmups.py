"""Schedules that rise linearly from almost nothing before they decay: warmup-cosine and warmup-stable-decay."""

import math
from typing import Literal

import attrs

from steploop.core.schedules.rates import (
    check_min_lr,
    learning_rate,
    min_learning_rate,
    some_steps,
    total_steps,
)
from steploop.core.validators import one_of, refuse, to_integer, to_real

Decay = Literal["linear", "cos", "sqrt"]


@attrs.frozen(kw_only=True)
class WarmupCosine:
    """A linear rise to ``lr``, then half a cosine down to ``min_lr``; made by `warmup_cosine`."""

    lr: float = attrs.field(converter=to_real, validator=learning_rate)
    warmup_steps: int = attrs.field(converter=to_integer, validator=some_steps)
    total_steps: int = attrs.field(converter=to_integer, validator=total_steps)
    min_lr: float = attrs.field(converter=to_real, validator=min_learning_rate)

    def __attrs_post_init__(self) -> None:
        check_min_lr(self, min_lr=self.min_lr, lr=self.lr)
        if self.warmup_steps > self.total_steps:
            raise refuse(
                self,
                "warmup_steps",
                f"<= total_steps ({self.total_steps})",
                self.warmup_steps,
                "total_steps counts the warmup too.",
            )

    def for_factor(self, factor: float) -> "WarmupCosine":
        """The schedule of a group whose rate is ``factor`` times the first group's: ``min_lr`` is the same in every group.

        A group whose highest rate lies below ``min_lr`` keeps that rate.
        """
        lr = self.lr * factor
        return attrs.evolve(self, lr=lr, min_lr=min(self.min_lr, lr))

    def __call__(self, step: int) -> float:
        """The learning rate of the step after ``step`` (>= 0) applied ones."""
        if step < self.warmup_steps:
            return self.lr * ((step + 1) / self.warmup_steps)
        if step >= self.total_steps:  # before the division: the cosine may have no length
            return self.min_lr
        part = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * part)) / 2


@attrs.frozen(kw_only=True)
class WarmupStableDecay:
    """A linear rise to ``lr``, a plateau, a decay to ``min_lr``; made by `warmup_stable_decay`."""

    lr: float = attrs.field(converter=to_real, validator=learning_rate)
    warmup_steps: int = attrs.field(converter=to_integer, validator=some_steps)
    stable_steps: int = attrs.field(converter=to_integer, validator=some_steps)
    decay_steps: int = attrs.field(converter=to_integer, validator=some_steps)
    min_lr: float = attrs.field(converter=to_real, validator=min_learning_rate)
    decay: Decay = attrs.field(
        validator=one_of("linear", "cos", "sqrt", hint='The usual one is "linear"; "sqrt" is 1 - sqrt(u).')
    )

    def __attrs_post_init__(self) -> None:
        check_min_lr(self, min_lr=self.min_lr, lr=self.lr)

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the three phases together; from there on the rate is ``min_lr``."""
        return self.warmup_steps + self.stable_steps + self.decay_steps

    def for_factor(self, factor: float) -> "WarmupStableDecay":
        """The schedule of a group whose rate is ``factor`` times the first group's: ``min_lr`` is the same in every group.

        A group whose highest rate lies below ``min_lr`` keeps that rate.
        """
        lr = self.lr * factor
        return attrs.evolve(self, lr=lr, min_lr=min(self.min_lr, lr))

    def __call__(self, step: int) -> float:
        """The learning rate of the step after ``step`` (>= 0) applied ones."""
        if step < self.warmup_steps:
            return self.lr * ((step + 1) / self.warmup_steps)
        decayed = step - self.warmup_steps - self.stable_steps
        if decayed < 0:
            return self.lr
        if decayed >= self.decay_steps:  # before the division: the decay may have no length
            return self.min_lr
        part = decayed / self.decay_steps
        if self.decay == "linear":
            left = 1 - part
        elif self.decay == "cos":
            left = (1 + math.cos(math.pi * part)) / 2
        else:
            left = 1 - math.sqrt(part)
        return self.min_lr + (self.lr - self.min_lr) * left


def warmup_cosine(lr: float, *, warmup_steps: int, total_steps: int, min_lr: float = 0.0) -> WarmupCosine:
    """Rise linearly to ``lr``, then go down to ``min_lr`` along half a cosine.

        eta(t) = lr * (t + 1) / W                                                      for t < W
        eta(t) = min_lr + (lr - min_lr) * (1 + cos(pi * (t - W) / (T - W))) / 2        for W <= t < T
        eta(t) = min_lr                                                                for t >= T

    With W = ``warmup_steps`` and T = ``total_steps``. The first step already trains, with lr / W, as in torchtitan;
    the form t / W of Hugging Face gives it the rate 0, a step thrown away. Step W - 1 is the first with the whole
    ``lr``. When W = T there is no cosine: all T steps rise, and what comes after them has ``min_lr``.

    Args:
        lr: the highest learning rate, >= 0.
        warmup_steps: W, in optimizer steps, 0 <= W <= T; 0 is `cosine_annealing`.
        total_steps: T, in optimizer steps, the warmup included, >= 1.
        min_lr: the learning rate from step T on, 0 <= min_lr <= lr.

    Returns:
        A frozen schedule, ``step -> learning rate``.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Source: Goyal et al. 2017 (warmup), https://arxiv.org/abs/1706.02677; Loshchilov and Hutter 2017 (cosine),
    https://arxiv.org/abs/1608.03983; the first step as in pytorch/torchtitan, ``torchtitan/components/lr_scheduler.py``.

    Example:
        >>> rate = warmup_cosine(0.1, warmup_steps=2, total_steps=10)
        >>> rate(0), rate(1), rate(10)
        (0.05, 0.1, 0.0)
    """
    return WarmupCosine(lr=lr, warmup_steps=warmup_steps, total_steps=total_steps, min_lr=min_lr)


def warmup_stable_decay(
    lr: float,
    *,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    min_lr: float = 0.0,
    decay: Decay = "linear",
) -> WarmupStableDecay:
    """Rise linearly to ``lr``, stay there, then go down to ``min_lr``.

        eta(t) = lr * (t + 1) / W                          for t < W
        eta(t) = lr                                        for W <= t < W + S
        eta(t) = min_lr + (lr - min_lr) * f(u)             for t < W + S + D,  u = (t - W - S) / D
        eta(t) = min_lr                                    afterwards

    With W, S, D the steps of the three phases, each of which may have none, and f(u) = 1 - u ("linear"),
    (1 + cos(pi u)) / 2 ("cos") or 1 - sqrt(u) ("sqrt"). The first step trains with lr / W, as in `warmup_cosine`.
    A run can be made longer from any point of the plateau: its rates up to there do not depend on S.

    Args:
        lr: the highest learning rate, >= 0.
        warmup_steps: W, in optimizer steps, >= 0.
        stable_steps: S, in optimizer steps, >= 0.
        decay_steps: D, in optimizer steps, >= 0.
        min_lr: the learning rate after the decay, 0 <= min_lr <= lr.
        decay: the form of f.

    Returns:
        A frozen schedule, ``step -> learning rate``.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Source: Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395; 1 - sqrt: Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392.

    Example:
        >>> rate = warmup_stable_decay(0.1, warmup_steps=2, stable_steps=5, decay_steps=2)
        >>> [rate(step) for step in (0, 2, 6, 8, 9)]
        [0.05, 0.1, 0.1, 0.05, 0.0]
    """
    return WarmupStableDecay(
        lr=lr,
        warmup_steps=warmup_steps,
        stable_steps=stable_steps,
        decay_steps=decay_steps,
        min_lr=min_lr,
        decay=decay,
    )
