"""Laws of early stopping, the best value and the plateau, over any history of metrics."""

import json
import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, Protocol

import attrs
import torch

from steploop.core.early_stopping import EarlyStopping
from steploop.core.plateau import ReduceLROnPlateau
from steploop.testing.state_comparison import require

__all__ = [
    "MetricFold",
    "check_best_is_the_running_best",
    "check_max_is_min_of_the_negative",
    "check_metric_fold_splits",
    "check_more_min_delta_never_stops_later",
    "check_more_patience_never_stops_earlier",
    "check_plateau_equals_torch",
    "check_stops_at_the_patience_th_bad_check",
    "stop_check",
]


class MetricFold(Protocol):
    """What ``EarlyStopping`` and ``ReduceLROnPlateau`` have in common."""

    def init(self) -> Any:
        """Return the state before the first check."""
        ...

    def update(self, state: Any, metric: float) -> Any:
        """Return the state after one more check."""
        ...


def stop_check(early: EarlyStopping, history: Sequence[float]) -> float:
    """Return the 1-based check at which a run stops, or infinity.

    Example:
        >>> stop_check(EarlyStopping(patience=2, mode="min"), [1.0, 2.0, 3.0, 0.5])
        3
    """
    states = accumulate(history, early.update, initial=early.init())
    return next((check for check, state in enumerate(states) if state.stopped), math.inf)


def check_stops_at_the_patience_th_bad_check(early: EarlyStopping, history: Sequence[float]) -> None:
    """Law 10. It stops at the patience-th check in a row without improvement, and never before.

    Against the definition, written without a fold: a check is bad unless its value beats all before it by more
    than min_delta.

    Example:
        >>> check_stops_at_the_patience_th_bad_check(EarlyStopping(patience=2, mode="min"), [1.0, 2.0, 3.0])
    """
    sign = 1 if early.mode == "min" else -1
    bad = []
    for check, value in enumerate(history):
        before = [sign * old for old in history[:check] if not math.isnan(old)]
        good = not math.isnan(value) and (not before or sign * value < min(before) - early.min_delta)
        bad.append(not good)
    ends = range(early.patience, len(bad) + 1)
    expected = next((end for end in ends if all(bad[end - early.patience : end])), math.inf)
    found = stop_check(early, history)
    require(found == expected, f"{early} must stop at check {expected}, but stopped at {found}")
    stopped = reduce(early.update, history, early.init()).stopped
    require(stopped == (expected <= len(history)), f"{early}: once stopped it must stay stopped")


def check_best_is_the_running_best(early: EarlyStopping, history: Sequence[float]) -> None:
    """Law 10. best = the least (largest) of all metrics that are not nan, or None.

    Example:
        >>> check_best_is_the_running_best(EarlyStopping(patience=2, mode="min"), [1.0, 2.0, float("nan"), 0.5])
    """
    numbers = [value for value in history if not math.isnan(value)]
    best = (min if early.mode == "min" else max)(numbers, default=None)
    found = reduce(early.update, history, early.init()).best
    require(found == best, f"{early}: the best of {list(history)} must be {best}, but is {found}")


def check_more_patience_never_stops_earlier(
    early: EarlyStopping, history: Sequence[float], more: int
) -> None:
    """Law 10. stop(patience + k) >= stop(patience).

    Example:
        >>> check_more_patience_never_stops_earlier(EarlyStopping(patience=1, mode="min"), [1.0, 2.0, 3.0], more=1)
    """
    longer = attrs.evolve(early, patience=early.patience + more)
    less, greater = stop_check(early, history), stop_check(longer, history)
    require(
        greater >= less,
        f"more patience must not stop earlier, but {longer} stops at {greater} and {early} at {less}",
    )


def check_more_min_delta_never_stops_later(
    early: EarlyStopping, history: Sequence[float], more: float
) -> None:
    """Law 10. stop(min_delta + d) <= stop(min_delta).

    Example:
        >>> check_more_min_delta_never_stops_later(EarlyStopping(patience=1, mode="min"), [1.0, 0.9, 0.8], more=0.5)
    """
    stricter = attrs.evolve(early, min_delta=early.min_delta + more)
    less, greater = stop_check(early, history), stop_check(stricter, history)
    require(
        greater <= less,
        f"more min_delta must not stop later, but {stricter} stops at {greater} and {early} at {less}",
    )


def check_max_is_min_of_the_negative(early: EarlyStopping, history: Sequence[float]) -> None:
    """Law 10. The states of "max" over v are those of "min" over -v, with best negated, after every check.

    Example:
        >>> check_max_is_min_of_the_negative(EarlyStopping(patience=2, mode="min"), [1.0, 2.0, 0.5])
    """
    least, most = attrs.evolve(early, mode="min"), attrs.evolve(early, mode="max")
    lows = accumulate([-value for value in history], least.update, initial=least.init())
    highs = accumulate(history, most.update, initial=most.init())
    for check, (low, high) in enumerate(zip(lows, highs, strict=True)):
        mirrored = high if high.best is None else attrs.evolve(high, best=-high.best)
        require(
            low == mirrored, f"max of x must equal min of -x, but after check {check} {low} is not {mirrored}"
        )


def check_metric_fold_splits(described: MetricFold, history: Sequence[float], cut: int) -> None:
    """Laws 10, 11. Splitting the history, writing the state as JSON in between and going on changes nothing.

    Example:
        >>> check_metric_fold_splits(EarlyStopping(patience=2, mode="min"), [1.0, 2.0, 0.5], cut=1)
    """
    half = reduce(described.update, history[:cut], described.init())
    loaded = type(half)(**json.loads(json.dumps(attrs.asdict(half))))
    found = reduce(described.update, history[cut:], loaded)
    expected = reduce(described.update, history, described.init())
    require(found == expected, f"{described} after a split at {cut} must be {expected}, but is {found}")


def check_plateau_equals_torch(plateau: ReduceLROnPlateau, history: Sequence[float]) -> None:
    """Law 11. Rate, best, bad checks and cooldown are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``.

    To the bit, after every check, nan and infinities included; where there is no best yet torch has an infinity.

    Example:
        >>> plateau = ReduceLROnPlateau(lr=0.1, patience=1)
        >>> check_plateau_equals_torch(plateau, [1.0, 1.0, 1.0, 0.5])
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=plateau.lr)
    options = {key: value for key, value in attrs.asdict(plateau).items() if key != "lr"}
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
    worst = math.inf if plateau.mode == "min" else -math.inf
    state = plateau.init()
    for check, metric in enumerate(history):
        scheduler.step(metric)
        state = plateau.update(state, metric)
        best = worst if state.best is None else state.best
        found = (state.learning_rate, best, state.bad_checks, state.cooldown_left)
        expected = (
            optimizer.param_groups[0]["lr"],
            scheduler.best,
            scheduler.num_bad_epochs,
            scheduler.cooldown_counter,
        )
        require(
            found == expected,
            f"after check {check} (rate, best, bad checks, cooldown) must be torch's {expected}, but are {found}",
        )
