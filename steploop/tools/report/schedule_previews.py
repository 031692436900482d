"""Tabulate the schedules of the package, each with settings that show its shape."""

import difflib
from collections.abc import Callable, Mapping, Sequence

import attrs

from steploop.core.schedules import (
    Rates,
    Schedule,
    constant,
    cosine_annealing,
    one_cycle,
    step_lr,
    warmup_cosine,
    warmup_stable_decay,
)
from steploop.errors import ConfigError

__all__ = ["Preview", "preview_schedules"]


@attrs.frozen
class Preview:
    """What schedules give for the steps 0, 1, ... .

    Attributes:
        rates: name -> learning rates.
        momenta: name -> momenta, for the schedules that cycle it.
    """

    rates: Mapping[str, Sequence[float]]
    momenta: Mapping[str, Sequence[float]]


# name -> (highest rate, steps) -> schedule; a tenth of the steps is a usual warmup
_MAKERS: Mapping[str, Callable[[float, int], Schedule]] = {
    "constant": lambda lr, _: constant(lr),
    "step_lr": lambda lr, steps: step_lr(lr, step_size=-(-steps // 3)),
    "cosine_annealing": lambda lr, steps: cosine_annealing(lr, total_steps=steps),
    "one_cycle": lambda lr, steps: one_cycle(lr, total_steps=steps, momentum=(0.85, 0.95)),
    "warmup_cosine": lambda lr, steps: warmup_cosine(lr, warmup_steps=steps // 10, total_steps=steps),
    "warmup_stable_decay": lambda lr, steps: warmup_stable_decay(
        lr, warmup_steps=steps // 10, stable_steps=steps - steps // 10 - steps // 5, decay_steps=steps // 5
    ),
}


def preview_schedules(names: Sequence[str], *, steps: int, lr: float) -> Preview:
    """Tabulate schedules over ``steps`` steps with the highest rate ``lr``.

    Args:
        names: which; all where none is named.
        steps: how many steps, >= 2.
        lr: the highest learning rate, >= 0.

    Raises:
        ConfigError: there is no schedule of a name; says the nearest.
    """
    for name in names:
        if name not in _MAKERS:
            near = difflib.get_close_matches(name, _MAKERS, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(f"There is no schedule {name!r}. {hint}There are: {', '.join(_MAKERS)}.")
    rates: dict[str, list[float]] = {}
    momenta: dict[str, list[float]] = {}
    for name in names or _MAKERS:
        schedule = _MAKERS[name](lr, steps)
        values = [schedule(step) for step in range(steps)]
        rates[name] = [v.learning_rate if isinstance(v, Rates) else v for v in values]
        if cycled := [v.momentum for v in values if isinstance(v, Rates)]:
            momenta[name] = cycled
    return Preview(rates, momenta)
