"""Early stopping as a fold over a metric, and the best value so far."""

import math
from typing import Any, Literal

import attrs

from steploop.core.validators import boolean, integer, one_of, real, refuse, to_integer, to_real
from steploop.errors import ConfigError

Mode = Literal["min", "max"]


def is_better(value: float, best: float | None, mode: Mode, *, min_delta: float = 0.0) -> bool:
    """Whether a metric improves on the best so far.

        min:  value < best - min_delta          max:  value > best + min_delta

    NaN is never better. The first value that is not NaN is better than no value (``best=None``), whatever it is.
    Infinities are ordered as numbers are: -inf is the best there is for "min" (and +inf for "max", as a PSNR can be).

    Args:
        value: the metric now.
        best: the metric to beat, never NaN; None where there is none yet.
        mode: "min" where less is better (a loss), "max" where more is (an accuracy).
        min_delta: how much better it has to be, in the metric's unit, >= 0.

    Returns:
        True if it is better. Equal to the bound is not.

    Raises:
        ConfigError: ``mode`` is neither "min" nor "max".
    """
    if mode not in {"min", "max"}:
        raise ConfigError(f'is_better: mode must be "min" or "max", got {mode!r}. Give "min" for a loss.')
    if best is None:
        return not math.isnan(value)
    return value < best - min_delta if mode == "min" else value > best + min_delta


def not_nan(owner: object, attribute: "attrs.Attribute[Any]", value: object) -> None:
    """An attrs validator: a float, infinities included, but not NaN; raises ConfigError."""
    if not isinstance(value, float) or math.isnan(value):
        hint = "A metric that is NaN is never the best; None stands for no value yet."
        raise refuse(owner, attribute.name, "a number, not NaN", value, hint)


_COUNT = integer(at_least=0, hint="It counts, from 0.")


@attrs.frozen(kw_only=True)
class Best:
    """The best value of the monitored metric so far, and where it was measured.

    Attributes:
        value: the metric, never NaN.
        step: optimizer steps applied when it was measured.
        epoch: the epoch in which it was measured.
    """

    value: float = attrs.field(converter=to_real, validator=not_nan)
    step: int = attrs.field(converter=to_integer, validator=_COUNT)
    epoch: int = attrs.field(default=0, converter=to_integer, validator=_COUNT)


def keep_best(
    best: Best | None, value: float, *, step: int, epoch: int = 0, mode: Mode = "min"
) -> Best | None:
    """Return the better of the best so far and a new value; of equal ones the earlier.

    Args:
        best: the best so far, or None.
        value: the metric now; NaN is never better.
        step: optimizer steps applied.
        epoch: the epoch.
        mode: "min" where less is better, "max" where more is.

    Returns:
        ``best`` itself, or a new Best; None while every value was NaN.

    Raises:
        ConfigError: ``mode`` is neither "min" nor "max".
    """
    if is_better(value, None if best is None else best.value, mode):
        return Best(value=value, step=step, epoch=epoch)
    return best


@attrs.frozen(kw_only=True)
class StoppingState:
    """The state of early stopping between two checks: plain numbers, saved with a TrainState.

    Attributes:
        best: the best metric so far, or None before the first one that is not NaN.
        bad_checks: checks in a row without improvement; grows by one at each of them, 0 after an improvement.
        stopped: whether ``bad_checks`` has reached the patience; once true it stays true.
    """

    best: float | None = attrs.field(
        default=None, converter=to_real, validator=attrs.validators.optional(not_nan)
    )
    bad_checks: int = attrs.field(default=0, converter=to_integer, validator=_COUNT)
    stopped: bool = attrs.field(default=False, validator=boolean(hint="It says whether to end the run."))


@attrs.frozen(kw_only=True)
class EarlyStopping:
    """Stop at the ``patience``-th check in a row without improvement.

        improved(v) = v < best - min_delta     (min),    v > best + min_delta     (max)
        best'       = the better one of best and v
        bad_checks' = 0 if improved(v) else bad_checks + 1
        stopped'    = stopped or bad_checks' >= patience

    The first value is the baseline, so that a metric that never moves stops the run at check ``patience + 1``. NaN is
    never an improvement and never the best, be it the first value or a later one. Infinities are ordered as numbers.

    ``best`` is the best value there was, moved by an improvement of any size: a value has to beat the best one by more
    than ``min_delta``, as in Ignite and Hugging Face, and gains that are each too small do not add up. (Lightning and
    Keras compare with the last value that counted as an improvement, so that they add up, and there a larger
    ``min_delta`` can stop later than a smaller one; here it never does. With ``min_delta=0`` all agree.)

    The fold is pure: ``functools.reduce(early.update, metrics, early.init())``, and splitting the metrics anywhere
    changes nothing. ``monitor`` is only a name: what is passed to `update` is what counts.

    Attributes:
        patience: checks in a row without improvement that stop the run, >= 1. A check is one evaluation.
        min_delta: how much better a value has to be to count, in the metric's unit, >= 0.
        mode: "min" where less is better (a loss), "max" where more is (an accuracy).
        monitor: the name of the metric.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Example:
        >>> early = EarlyStopping(patience=2, mode="min")
        >>> stopping = reduce(early.update, [1.0, 1.1, 1.2], early.init())
        >>> stopping.stopped
        True
    """

    patience: int = attrs.field(
        default=10,
        converter=to_integer,
        validator=integer(
            at_least=1, hint="It counts evaluations; for no early stopping leave it out altogether."
        ),
    )
    min_delta: float = attrs.field(
        default=0.0,
        converter=to_real,
        validator=real(
            at_least=0.0, hint='Give 0 to count any improvement; the direction is said by mode="max".'
        ),
    )
    mode: Mode = attrs.field(
        default="min", validator=one_of("min", "max", hint='Give "min" for a loss, "max" for an accuracy.')
    )
    monitor: str = attrs.field(default="loss")

    @monitor.validator
    def _check_monitor(self, attribute: "attrs.Attribute[str]", value: object) -> None:
        if not isinstance(value, str) or not value:
            raise refuse(self, attribute.name, "the name of a metric", value, 'Give for instance "loss".')

    def init(self) -> StoppingState:
        """Return the state before the first check."""
        return StoppingState()

    def update(self, state: StoppingState, metric: float) -> StoppingState:
        """Return the state after one more check.

        Args:
            state: the state before it, which stays as it is.
            metric: the value of the monitored metric; NaN and infinities are allowed.

        Returns:
            A new state, whose ``stopped`` says whether to end the run.
        """
        value = float(metric)
        improved = is_better(value, state.best, self.mode, min_delta=self.min_delta)
        bad_checks = 0 if improved else state.bad_checks + 1
        return StoppingState(
            best=value if is_better(value, state.best, self.mode) else state.best,
            bad_checks=bad_checks,
            stopped=state.stopped or bad_checks >= self.patience,
        )
