"""Where the runs of a sweep stand on an axis for each setting: what every drawing of a sweep is made of."""

import json
import math
from collections.abc import Sequence
from typing import Any

import attrs

from steploop.runs.record_values import is_number
from steploop.tools.report.charts import Axis, nice_ticks, number
from steploop.tools.report.run_labels import short
from steploop.tools.sweep.member_results import MemberResult
from steploop.tools.sweep.sweep_result import SweepResult

__all__ = ["Placed", "SweepAxes", "sweep_axes"]

_LOG_FROM = 20  # the largest value over the smallest from which on an axis is logarithmic: learning rates are tried so
_MOST_NAMED = 7
_MARGIN = 0.06


@attrs.frozen
class Placed:
    """One axis and the place of each run on it.

    Attributes:
        name: of the setting or metric.
        places: of each run, from 0 to 1.
        ticks: (place, text) of the values that are named.
    """

    name: str
    places: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]

    def means(self, heights: Sequence[float]) -> list[tuple[float, float]]:
        """(place, mean height) for each place where runs stand, from left to right."""
        by_place: dict[float, list[float]] = {}
        for place, height in zip(self.places, heights, strict=True):
            by_place.setdefault(place, []).append(height)
        return [(place, sum(some) / len(some)) for place, some in sorted(by_place.items())]


@attrs.frozen
class SweepAxes:
    """The axes of a sweep.

    Attributes:
        runs: those that have a result, best first.
        settings: an axis for each setting that differs.
        metric: the axis of the result.
    """

    runs: tuple[MemberResult, ...]
    settings: tuple[Placed, ...]
    metric: Placed


def sweep_axes(result: SweepResult) -> SweepAxes | None:
    """The axes of a sweep; None while no run has a result."""
    found = [m for m in result.members if m.value is not None and m.state in {"finished", "pruned"}]
    if not found or result.metric is None:
        return None
    found.sort(key=lambda m: (m.value or 0.0) * (-1.0 if result.mode == "max" else 1.0))
    names = dict.fromkeys(name for member in found for name in member.settings)
    in_order = sorted(found, key=lambda member: member.number)
    axes = [
        _placed(name, [m.settings.get(name) for m in found], [m.settings.get(name) for m in in_order])
        for name in names
    ]
    return SweepAxes(
        tuple(found),
        tuple(axis for axis in axes if len(set(axis.places)) > 1),
        _of_numbers(result.metric, [member.value or 0.0 for member in found], may_log=False),
    )


def _placed(name: str, values: Sequence[Any], in_order: Sequence[Any]) -> Placed:
    if all(is_number(value) for value in values):
        return _of_numbers(name, [float(value) for value in values], may_log=True)
    # what is no number stands side by side, in the order of the grid
    keys = [json.dumps(value, sort_keys=True) for value in values]
    order = list(dict.fromkeys(json.dumps(value, sort_keys=True) for value in in_order))
    place = {key: (n + 0.5) / len(order) for n, key in enumerate(order)}
    texts = {key: short(value) for key, value in zip(keys, values, strict=True)}
    shown = order[:: -(-len(order) // _MOST_NAMED)]
    return Placed(name, tuple(place[key] for key in keys), tuple((place[key], texts[key]) for key in shown))


def _of_numbers(name: str, values: Sequence[float], *, may_log: bool) -> Placed:
    low, high = min(values), max(values)
    log = may_log and low > 0 and high / low >= _LOG_FROM
    if log:
        margin = (high / low) ** _MARGIN
        axis = Axis(low / margin, high * margin, (), log=True)
    else:
        span = _MARGIN * (high - low) or 0.1 * abs(high) or 1.0
        axis = Axis(low - span, high + span, ())
    distinct = sorted(set(values))
    if len(distinct) <= _MOST_NAMED:
        ticks = distinct
    elif log:
        decades = range(math.ceil(math.log10(axis.low)), math.floor(math.log10(axis.high)) + 1)
        ticks = [10.0**n for n in decades] or [low, high]
    else:
        ticks = nice_ticks(axis.low, axis.high)
    return Placed(name, tuple(map(axis.at, values)), tuple((axis.at(tick), number(tick)) for tick in ticks))
