"""``schedule``: sets the learning rate of the next step from the number of steps taken, wherever that number is."""

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.schedules import Rates, Schedule
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.errors import ConfigError

__all__ = ["schedule", "set_rates"]

# A count that is on the device is read once in so many steps; in between the rate is looked up in a table there.
_TABLE_STEPS = 1024


def schedule(state: TrainState, learning_rate: Schedule) -> TrainState:
    """Set the learning rate to ``learning_rate(applied_steps)``: the rate of the next step.

    Idempotent. ``schedule(TrainState.create(model, optimizer), f)`` gives the first step its rate, and as the last
    line of a train step it gives the next one its. A skipped step does not advance it. A group keeps its proportion
    to the optimizer's ``lr``; ``Rates`` sets the momentum (or the first beta) of every group as well.

    Args:
        state: any living state.
        learning_rate: a pure function of the number of steps taken.
    """
    state.check_alive("schedule")
    taken = state.applied_steps
    if isinstance(taken, Tensor):
        if (trace := trace_of(state)) is not None:
            scheduled: TrainState = trace.schedule(state, learning_rate)
            return scheduled
        return _scheduled_on_device(state, learning_rate, taken)
    value = learning_rate(taken)
    return (
        set_rates(state, value.learning_rate, value.momentum)
        if isinstance(value, Rates)
        else set_rates(state, value)
    )


def set_rates(state: TrainState, rate: float | Tensor, momentum: float | Tensor | None = None) -> TrainState:
    """Put a learning rate, and a momentum if one is given, into every parameter group."""
    pairs = zip(state.hyper, state._machine.rate_factors, strict=True)
    # a factor of 1 multiplies nothing, so that a rate keeps its bits and an int stays one
    groups = [{**group, "lr": rate if factor == 1.0 else rate * factor} for group, factor in pairs]
    if momentum is not None:
        groups = [{**group, **_momentum(group, momentum)} for group in groups]
    return state.replace(hyper=tuple(groups))


def _momentum(group: Mapping[str, Any], momentum: float | Tensor) -> dict[str, Any]:
    if "betas" in group:
        return {"betas": (momentum, *group["betas"][1:])}
    if "momentum" in group:
        return {"momentum": momentum}
    raise ConfigError(
        "schedule: this schedule cycles the momentum, but the optimizer has neither momentum nor betas. "
        "Pass momentum=None to the schedule, or use an optimizer that has one."
    )


@attrs.frozen(eq=False)
class _Table:
    """A schedule's values from ``base`` on, as tensors on the device."""

    learning_rate: Schedule
    base: int
    rates: Tensor
    momenta: Tensor | None

    @classmethod
    def of(cls, learning_rate: Schedule, base: int, device: torch.device) -> "_Table":
        values = [learning_rate(step) for step in range(base, base + _TABLE_STEPS + 1)]
        rates = [v.learning_rate if isinstance(v, Rates) else v for v in values]
        momenta = [v.momentum for v in values if isinstance(v, Rates)]
        return cls(
            learning_rate,
            base,
            torch.tensor(rates, dtype=torch.float32, device=device),
            torch.tensor(momenta, dtype=torch.float32, device=device) if momenta else None,
        )


def _scheduled_on_device(state: TrainState, learning_rate: Schedule, taken: Tensor) -> TrainState:
    """The rate as a 0-dim tensor that the host never reads: a gather from the table, by the count on the device."""
    base, since = state._known
    if state.attempted_steps - since > _TABLE_STEPS:
        return schedule(state.settle(), learning_rate)
    machine = state._machine
    table = machine.rate_table
    if not isinstance(table, _Table) or table.learning_rate is not learning_rate or table.base != base:
        table = machine.rate_table = _Table.of(learning_rate, base, taken.device)
    index = taken - base
    # take, for rates[index] would read the index to the host and wait for the device
    rate = table.rates.take(index)
    return set_rates(state, rate, None if table.momenta is None else table.momenta.take(index))
