"""``schedule``: set the learning rate of the next step from the number of steps taken, wherever that number is."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.optimizer import check_rate
from steploop.core.schedules import Rates, Schedule, Tabulated
from steploop.core.state.machine import Machine
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.errors import ConfigError

__all__ = ["Schedules", "hyper_at", "put_rates", "schedule", "set_rates", "values_at"]

# One schedule for all groups, or one for each: group (its selector as it was written, or its index) -> schedule
Schedules = Schedule | Mapping[str | int, Schedule]

# A count that is on the device is read once in so many steps; in between the rate is looked up in a table there.
_TABLE_STEPS = 1024


def schedule(state: TrainState, learning_rate: Schedules) -> TrainState:
    """Set the learning rate to ``learning_rate(applied_steps)``: the rate of the next step.

    Idempotent. ``schedule(TrainState.create(model, optimizer), f)`` gives the first step its rate, and as the last
    line of a train step it gives the next one its. A skipped step does not advance it. ``Rates`` sets the momentum (or
    the first beta) as well.

    A group keeps its proportion to the optimizer's ``lr``: with f(t) for the first group it gets f(t) * lr_group / lr.
    Ends that a schedule names absolutely are absolute in every group, as in torch: ``min_lr``, and ``max_lr`` of
    ``one_cycle``. ``from_torch`` gives each group what torch gives it.

    Args:
        state: any living state.
        learning_rate: a pure function of the number of steps taken; or several, ``{group: function}``, where a group
            is named by its selector as it was written in ``Optimizer(groups=[...])`` or by its index in
            ``state.hyper``. Its values are absolute; a group that is not named keeps its rate.

    Raises:
        ConfigError: a rate that is negative, nan or infinite; a group that there is not.

    Example:
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
        >>> schedule(state, lambda step: 0.5 / (1 + step)).learning_rate
        0.5
    """
    state.check_alive("schedule")
    taken: Any = state.applied_steps
    if type(taken) is not int:
        if (trace := trace_of(state)) is not None:
            scheduled: TrainState = trace.schedule(state, learning_rate)
            return scheduled
        if isinstance(taken, Tensor):
            return _scheduled_on_device(state, learning_rate, taken)
    return state.replace(hyper=hyper_at(state.machine, state.hyper, learning_rate, taken))


def hyper_at(
    machine: Machine, hyper: tuple[Mapping[str, Any], ...], learning_rate: Schedules, step: int
) -> tuple[Mapping[str, Any], ...]:
    """The hyperparameters of each group with the rates that hold after ``step`` steps."""
    functions = _functions(machine, learning_rate)
    if functions is None and len(hyper) == 1:
        rate = learning_rate(step)  # type: ignore[operator]  # it is no mapping
        if type(rate) is float and 0.0 <= rate < math.inf:  # the usual one, at every step
            group = hyper[0]  # two dictionaries are joined in a third of the time of {**group}
            return (group | {"lr": rate} if type(group) is dict else {**group, "lr": rate},)
        return _with_values(hyper, [_value(rate)])
    return _with_values(hyper, values_at(machine, learning_rate, step))


def set_rates(state: TrainState, rate: float | Tensor, momentum: float | Tensor | None = None) -> TrainState:
    """Put a learning rate, and a momentum if one is given, into every parameter group, in their proportion."""
    factors = state.machine.rate_factors
    # a factor of 1 multiplies nothing, so that a rate keeps its bits and an int stays one
    rates = [rate if factor == 1.0 else rate * factor for factor in factors]
    return state.replace(hyper=_with_values(state.hyper, [(one, momentum) for one in rates]))


_Value = tuple[float | Tensor, float | Tensor | None]


def values_at(machine: Machine, learning_rate: Schedules, step: int) -> list[_Value | None]:
    """Rate and momentum of each parameter group after ``step`` steps; None for a group that keeps what it has."""
    functions = _functions(machine, learning_rate)
    if functions is None:
        return [_value(learning_rate(step))] * len(machine.group_names)  # type: ignore[operator]  # likewise
    return [None if function is None else _value(function(step)) for function in functions]


def _value(value: float | Rates) -> _Value:
    if isinstance(value, Rates):
        if isinstance(value.momentum, (int, float)) and not 0.0 <= value.momentum < 1.0:
            raise ConfigError(f"schedule: the momentum must lie in [0, 1), but is {value.momentum!r}.")
        return _rate(value.learning_rate), value.momentum
    return _rate(value), None


def _rate(rate: Any) -> Any:
    """A learning rate as Python's number, or as a tensor on a device; ConfigError where it is none."""
    if type(rate) is float and 0.0 <= rate < math.inf:  # the usual one, at every step
        return rate
    check_rate("schedule: the learning rate", rate)
    if type(rate) is float or type(rate) is int:
        return rate
    if isinstance(rate, Tensor) and rate.numel() == 1:
        return rate.item() if rate.device.type == "cpu" else rate.reshape(())
    if type(rate) is bool or not isinstance(rate, Real):
        raise ConfigError(f"schedule: the learning rate must be a finite number >= 0, but is {rate!r}.")
    return float(rate)


def _functions(machine: Machine, learning_rate: Schedules) -> list[Schedule | None] | None:
    """The schedule of each parameter group; None where one value holds for all."""
    known = machine.group_rates
    if known is None or known[0] is not learning_rate:
        known = machine.group_rates = (learning_rate, _of_groups(machine, learning_rate))
    return known[1]


def _of_groups(machine: Machine, learning_rate: Schedules) -> list[Schedule | None] | None:
    if isinstance(learning_rate, Mapping):
        return _named(machine, learning_rate)
    groups = learning_rate.groups if isinstance(learning_rate, Tabulated) else None
    if machine.uniform and (groups is None or groups == len(machine.group_names) == 1):
        return None
    factors = machine.rate_factors
    if isinstance(learning_rate, Tabulated):
        return list(learning_rate.for_groups(factors))
    return [_scaled(learning_rate, factor) for factor in factors]


def _named(machine: Machine, schedules: Mapping[str | int, Schedule]) -> list[Schedule | None]:
    found: list[Schedule | None] = [None] * len(machine.group_names)
    for group, function in schedules.items():
        where = [
            index
            for index, label in enumerate(machine.group_labels)
            if (index == group if isinstance(group, int) else label == group)
        ]
        if not where:
            names = ", ".join(
                repr(label) for label in dict.fromkeys(machine.group_labels) if label is not None
            )
            raise ConfigError(
                f"schedule: there is no parameter group {group!r}. There are {len(found)} groups, 0 to {len(found) - 1}"
                f"{', and the selectors ' + names if names else ''}."
            )
        for index in where:
            found[index] = function
    return found


def _scaled(learning_rate: Schedule, factor: float) -> Schedule:
    """The schedule of a group whose rate is ``factor`` times the first one's."""
    if factor == 1.0:
        return learning_rate
    ends = getattr(learning_rate, "min_lr", None), getattr(learning_rate, "max_lr", None)
    own: Callable[[float], Schedule] | None = getattr(learning_rate, "for_factor", None)
    if own is not None and any(ends):
        return own(factor)

    def scaled(step: int) -> float | Rates:
        value = learning_rate(step)
        if isinstance(value, Rates):
            return Rates(_rate(value.learning_rate) * factor, value.momentum)
        rate: float = _rate(value) * factor
        return rate

    return scaled


def _with_values(
    hyper: tuple[Mapping[str, Any], ...], values: list[_Value | None]
) -> tuple[Mapping[str, Any], ...]:
    groups = tuple([dict(group) for group in hyper])
    put_rates(groups, values)
    return groups


def put_rates(groups: Sequence[dict[str, Any]], values: list[_Value | None]) -> None:
    """Write what ``values_at`` gave into groups of hyperparameters, in place."""
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            group["lr"], momentum = value
            if momentum is not None:
                group.update(_momentum(group, momentum))


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
    """A schedule's values from ``base`` on, as tensors on the device: for each group rates and momenta, or None."""

    learning_rate: Schedules
    base: int
    groups: tuple[tuple[Tensor, Tensor | None] | None, ...]

    @classmethod
    def of(cls, machine: Machine, learning_rate: Schedules, base: int, device: torch.device) -> "_Table":
        rows = [values_at(machine, learning_rate, step) for step in range(base, base + _TABLE_STEPS + 1)]

        def tensor(column: list[Any]) -> Tensor:
            return torch.tensor(column, dtype=torch.float32, device=device)

        groups: list[tuple[Tensor, Tensor | None] | None] = []
        for column in zip(*rows, strict=True):
            if column[0] is None:
                groups.append(None)
                continue
            cycled = column[0][1] is not None
            momenta = tensor([value[1] for value in column if value]) if cycled else None
            groups.append((tensor([value[0] for value in column if value]), momenta))
        return cls(learning_rate, base, tuple(groups))


def _scheduled_on_device(state: TrainState, learning_rate: Schedules, taken: Tensor) -> TrainState:
    """The rate as a 0-dim tensor that the host never reads: a gather from the table, by the count on the device."""
    base, since = state.flight.known
    if state.attempted_steps - since > _TABLE_STEPS:
        return schedule(state.settle(), learning_rate)
    machine = state.machine
    table = machine.rate_table
    if not isinstance(table, _Table) or table.learning_rate is not learning_rate or table.base != base:
        table = machine.rate_table = _Table.of(machine, learning_rate, base, taken.device)
    index = taken - base
    # take, for rates[index] would read the index to the host and wait for the device
    values: list[_Value | None] = [
        None if group is None else (group[0].take(index), None if group[1] is None else group[1].take(index))
        for group in table.groups
    ]
    return state.replace(hyper=_with_values(state.hyper, values))
