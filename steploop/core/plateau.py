"""Lower the learning rate when a metric stops improving: torch's ReduceLROnPlateau as a fold."""

import math
from typing import Literal

import attrs

from steploop.core.early_stopping import Mode, not_nan
from steploop.core.validators import integer, one_of, real, refuse, to_integer, to_real

_COUNT = integer(at_least=0, hint="It counts evaluations, from 0.")
_RATE = real(at_least=0.0, hint="Common values lie between 1e-5 and 1.")


@attrs.frozen(kw_only=True)
class PlateauState:
    """The state of the plateau between two checks: plain numbers, saved with a TrainState.

    Attributes:
        learning_rate: the learning rate from now on; lowered when the patience is exceeded, never raised.
        best: the last metric that counted as better, or None before the first one that did.
        bad_checks: checks since ``best``, the cooldown's left out; 0 after a better one and after the rate was lowered.
        cooldown_left: checks left in which bad ones do not count; set when the rate is lowered, then down to 0.
    """

    learning_rate: float = attrs.field(converter=to_real, validator=_RATE)
    best: float | None = attrs.field(
        default=None, converter=to_real, validator=attrs.validators.optional(not_nan)
    )
    bad_checks: int = attrs.field(default=0, converter=to_integer, validator=_COUNT)
    cooldown_left: int = attrs.field(default=0, converter=to_integer, validator=_COUNT)


@attrs.frozen(kw_only=True)
class ReduceLROnPlateau:
    """Multiply the learning rate by ``factor`` after more than ``patience`` checks in a row without improvement.

        better(v):      v < best * (1 - threshold)    (min, rel)        v < best - threshold    (min, abs)
                        v > best * (1 + threshold)    (max, rel)        v > best + threshold    (max, abs)
        bad_checks'   = 0 if better(v) or in the cooldown else bad_checks + 1
        if bad_checks' > patience:
            rate'     = max(rate * factor, min_lr), if that lowers it by more than eps
            and the cooldown begins, with no bad checks

    Bit-equal to ``torch.optim.lr_scheduler.ReduceLROnPlateau`` for every history, NaN (a bad check) and infinities
    included. As in torch, it acts on the (patience + 1)-th bad check where early stopping acts on the patience-th; and
    "rel" with a negative metric takes an equal value for a better one: choose "abs" there.

    The fold is pure: ``functools.reduce(plateau.update, metrics, plateau.init())``; ``state.learning_rate`` is the rate.

    Attributes:
        lr: the learning rate to begin with, >= 0.
        mode: "min" where less is better (a loss), "max" where more is (an accuracy).
        factor: what the rate is multiplied by, 0 <= factor < 1.
        patience: bad checks in a row that are let pass, >= 0. A check is one evaluation.
        threshold: how much better a value has to be, >= 0: a part of ``best`` ("rel", < 1) or in the metric's unit.
        threshold_mode: "rel" or "abs".
        cooldown: checks after a lowering in which bad ones do not count, >= 0.
        min_lr: the rate never goes below this, 0 <= min_lr <= lr.
        eps: a change of the rate that is not larger than this is not made, >= 0.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Example:
        >>> plateau = ReduceLROnPlateau(lr=0.1, factor=0.5, patience=0)
        >>> reduce(plateau.update, [1.0, 2.0], plateau.init()).learning_rate
        0.05
    """

    lr: float = attrs.field(converter=to_real, validator=_RATE)
    mode: Mode = attrs.field(
        default="min", validator=one_of("min", "max", hint='Give "min" for a loss, "max" for an accuracy.')
    )
    factor: float = attrs.field(
        default=0.1,
        converter=to_real,
        validator=real(at_least=0.0, below=1.0, hint="Give 0.1 to divide the rate by ten."),
    )
    patience: int = attrs.field(default=10, converter=to_integer, validator=_COUNT)
    threshold: float = attrs.field(
        default=1e-4,
        converter=to_real,
        validator=real(at_least=0.0, hint="Give 0 to count any improvement."),
    )
    threshold_mode: Literal["rel", "abs"] = attrs.field(
        default="rel",
        validator=one_of("rel", "abs", hint='"rel" is a part of the best value, "abs" an amount.'),
    )
    cooldown: int = attrs.field(default=0, converter=to_integer, validator=_COUNT)
    min_lr: float = attrs.field(default=0.0, converter=to_real, validator=_RATE)
    eps: float = attrs.field(
        default=1e-8, converter=to_real, validator=real(at_least=0.0, hint="Torch's default is 1e-8.")
    )

    def __attrs_post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise refuse(self, "min_lr", f"<= lr ({self.lr!r})", self.min_lr, "Lower min_lr or raise lr.")
        if self.threshold_mode == "rel" and self.threshold >= 1.0:
            expected = 'below 1 where threshold_mode is "rel"'
            raise refuse(
                self, "threshold", expected, self.threshold, 'Give threshold_mode="abs" for an amount.'
            )

    def init(self) -> PlateauState:
        """Return the state before the first check; its rate is ``lr``."""
        return PlateauState(learning_rate=self.lr)

    def update(self, state: PlateauState, metric: float) -> PlateauState:
        """Return the state after one more check.

        Args:
            state: the state before it, which stays as it is.
            metric: the value of the monitored metric; NaN and infinities are allowed.

        Returns:
            A new state, with the learning rate from now on.
        """
        value = float(metric)
        better = self._is_better(value, state.best)
        rate = state.learning_rate
        bad_checks = 0 if better or state.cooldown_left > 0 else state.bad_checks + 1
        cooldown_left = max(state.cooldown_left - 1, 0)
        if bad_checks > self.patience:
            lowered = max(rate * self.factor, self.min_lr)
            if rate - lowered > self.eps:
                rate = lowered
            bad_checks, cooldown_left = 0, self.cooldown
        return PlateauState(
            learning_rate=rate,
            best=value if better else state.best,
            bad_checks=bad_checks,
            cooldown_left=cooldown_left,
        )

    def _is_better(self, value: float, best: float | None) -> bool:
        """Compare as torch does, in torch's arithmetic; anything beats no best."""
        if self.mode == "min":
            reference = math.inf if best is None else best
            relative = self.threshold_mode == "rel"
            return value < (reference * (1.0 - self.threshold) if relative else reference - self.threshold)
        reference = -math.inf if best is None else best
        relative = self.threshold_mode == "rel"
        return value > (reference * (self.threshold + 1.0) if relative else reference + self.threshold)
