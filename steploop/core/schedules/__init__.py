"""Schedules: pure functions of the number of applied steps, ``step -> learning rate`` (or ``Rates``).

A schedule is any callable ``int -> float | Rates``; step 0 is the rate of the first optimizer step. Those made here
are frozen values: they print readably, compare by their fields, and check them once, when they are made; a call checks
nothing and costs well under a microsecond. Past their last step they hold their last value.
"""

from steploop.core.schedules.cycles import OneCycle, one_cycle
from steploop.core.schedules.decays import (
    Constant,
    CosineAnnealing,
    StepDecay,
    constant,
    cosine_annealing,
    step_lr,
)
from steploop.core.schedules.rates import Rates, Schedule
from steploop.core.schedules.tables import Tabulated, from_torch
from steploop.core.schedules.warmups import (
    WarmupCosine,
    WarmupStableDecay,
    warmup_cosine,
    warmup_stable_decay,
)

__all__ = [
    "Constant",
    "CosineAnnealing",
    "OneCycle",
    "Rates",
    "Schedule",
    "StepDecay",
    "Tabulated",
    "WarmupCosine",
    "WarmupStableDecay",
    "constant",
    "cosine_annealing",
    "from_torch",
    "one_cycle",
    "step_lr",
    "warmup_cosine",
    "warmup_stable_decay",
]
