"""Schedules that start at their highest rate: constant, in steps, along a cosine."""

import math

import attrs

from steploop.core.schedules.rates import check_min_lr, learning_rate, min_learning_rate, total_steps
from steploop.core.validators import integer, real, to_integer, to_real


@attrs.frozen(kw_only=True)
class Constant:
    """The same rate at every step; made by `constant`."""

    lr: float = attrs.field(converter=to_real, validator=learning_rate)

    def __call__(self, step: int) -> float:  # noqa: ARG002  a schedule is called with the step
        """The learning rate, whatever ``step`` (>= 0) is."""
        return self.lr


@attrs.frozen(kw_only=True)
class StepDecay:
    """Times ``gamma`` every ``step_size`` steps; made by `step_lr`."""

    lr: float = attrs.field(converter=to_real, validator=learning_rate)
    step_size: int = attrs.field(
        converter=to_integer,
        validator=integer(at_least=1, hint="It counts the steps from one drop to the next."),
    )
    gamma: float = attrs.field(
        converter=to_real,
        validator=real(at_least=0.0, hint="Give 0.1 to divide the rate by ten at each drop."),
    )

    def __call__(self, step: int) -> float:
        """The learning rate of the step after ``step`` (>= 0) applied ones."""
        try:
            return self.lr * self.gamma ** (step // self.step_size)
        except OverflowError:  # gamma > 1 for too long: Python's ``**`` raises where torch's product is inf
            return math.inf if self.lr else 0.0


@attrs.frozen(kw_only=True)
class CosineAnnealing:
    """Half a cosine from ``lr`` to ``min_lr``; made by `cosine_annealing`."""

    lr: float = attrs.field(converter=to_real, validator=learning_rate)
    total_steps: int = attrs.field(converter=to_integer, validator=total_steps)
    min_lr: float = attrs.field(converter=to_real, validator=min_learning_rate)

    def __attrs_post_init__(self) -> None:
        check_min_lr(self, min_lr=self.min_lr, lr=self.lr)

    def for_factor(self, factor: float) -> "CosineAnnealing":
        """The schedule of a group whose rate is ``factor`` times the first group's: ``min_lr`` is the same in every group.

        A group whose highest rate lies below ``min_lr`` keeps that rate.
        """
        lr = self.lr * factor
        return attrs.evolve(self, lr=lr, min_lr=min(self.min_lr, lr))

    def __call__(self, step: int) -> float:
        """The learning rate of the step after ``step`` (>= 0) applied ones."""
        if step >= self.total_steps:
            return self.min_lr
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / self.total_steps)) / 2


def constant(lr: float) -> Constant:
    """The same learning rate at every step: eta(t) = lr.

    Args:
        lr: the learning rate, >= 0.

    Returns:
        A frozen schedule, ``step -> learning rate``.

    Raises:
        ConfigError: ``lr`` is not a finite number >= 0.

    Example:
        >>> constant(0.1)(1000)
        0.1
    """
    return Constant(lr=lr)


def step_lr(lr: float, *, step_size: int, gamma: float = 0.1) -> StepDecay:
    """Multiply the learning rate by ``gamma`` every ``step_size`` steps.

        eta(t) = lr * gamma ** floor(t / step_size)

    Torch multiplies step by step, so that its values differ from this by one rounding (1.1e-16 relative) a drop.

    Args:
        lr: the learning rate of the first ``step_size`` steps, >= 0.
        step_size: optimizer steps from one drop to the next, >= 1. (In most examples torch's counts epochs.)
        gamma: the factor of each drop, >= 0; above 1 the rate grows.

    Returns:
        A frozen schedule, ``step -> learning rate``. It has no last step.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Source: ``torch.optim.lr_scheduler.StepLR``.

    Example:
        >>> halves = step_lr(0.1, step_size=30, gamma=0.5)
        >>> halves(29), halves(30)
        (0.1, 0.05)
    """
    return StepDecay(lr=lr, step_size=step_size, gamma=gamma)


def cosine_annealing(lr: float, *, total_steps: int, min_lr: float = 0.0) -> CosineAnnealing:
    """Go from ``lr`` to ``min_lr`` along half a cosine.

        eta(t) = min_lr + (lr - min_lr) * (1 + cos(pi * t / T)) / 2    for t < T
        eta(t) = min_lr                                                for t >= T

    With T = ``total_steps``. Deviation: after T torch's climbs back to ``lr``, which it reaches at 2 T; this one stays.
    Torch uses a recursion, whose values differ from this closed form by about one rounding (1.1e-16 of ``lr``) a step.

    Args:
        lr: the learning rate of step 0, >= 0.
        total_steps: T, in optimizer steps, >= 1 (torch's ``T_max``).
        min_lr: the learning rate from step T on, 0 <= min_lr <= lr (torch's ``eta_min``).

    Returns:
        A frozen schedule, ``step -> learning rate``.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Source: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983;
    ``torch.optim.lr_scheduler.CosineAnnealingLR``.

    Example:
        >>> cosine = cosine_annealing(0.1, total_steps=10)
        >>> cosine(0), cosine(10)
        (0.1, 0.0)
    """
    return CosineAnnealing(lr=lr, total_steps=total_steps, min_lr=min_lr)
