"""The one-cycle schedule: a rise, a long fall, and momentum the other way round."""

import math
from typing import Any, Literal, NamedTuple

import attrs

from steploop.core.schedules.rates import Rates, learning_rate, total_steps
from steploop.core.validators import boolean, one_of, real, refuse, to_integer, to_real

Shape = Literal["cos", "linear"]
_SHAPE = one_of("cos", "linear", hint='Torch\'s default is "cos".')


class _Phase(NamedTuple):
    """From ``start`` to ``end`` (in steps, not always whole) the rate goes from ``lr[0]`` to ``lr[1]``."""

    start: float
    end: float
    is_cosine: bool
    lr: tuple[float, float]
    momentum: tuple[float, float] | None


def _anneal(ends: tuple[float, float], part: float, is_cosine: bool) -> float:
    """From ``ends[0]`` at part 0 to ``ends[1]`` at part 1, in torch's arithmetic, so that no bit differs."""
    start, end = ends
    if is_cosine:
        return end + (start - end) / 2.0 * (math.cos(math.pi * part) + 1)
    return (end - start) * part + start


def _to_momentum(value: object) -> Any:
    """A tuple of floats for a tuple or list of numbers; anything else as it came."""
    return tuple(to_real(number) for number in value) if isinstance(value, tuple | list) else value


def _check_momentum(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """Refuse anything but None and two floats with 0 <= base <= max < 1."""
    if value is not None and (
        not isinstance(value, tuple)
        or len(value) != 2
        or not all(isinstance(number, float) for number in value)
        or not 0.0 <= value[0] <= value[1] < 1.0
    ):
        expected = "None or two numbers (base, max) with 0 <= base <= max < 1"
        raise refuse(owner, attribute.name, expected, value, "Torch's defaults are (0.85, 0.95).")


@attrs.frozen(kw_only=True)
class OneCycle:
    """Up to ``max_lr``, then down to almost nothing; made by `one_cycle`."""

    max_lr: float = attrs.field(converter=to_real, validator=learning_rate)
    total_steps: int = attrs.field(converter=to_integer, validator=total_steps)
    pct_start: float = attrs.field(
        converter=to_real,
        validator=real(at_least=0.0, at_most=1.0, hint="It is a fraction of total_steps: 0.3 for 30%."),
    )
    div_factor: float = attrs.field(
        converter=to_real,
        validator=real(above=0.0, hint="The first rate is max_lr / div_factor; torch's is 25."),
    )
    final_div_factor: float = attrs.field(
        converter=to_real,
        validator=real(above=0.0, hint="The last rate is the first divided by it; torch's is 1e4."),
    )
    anneal: Shape = attrs.field(validator=_SHAPE)
    rise: Shape = attrs.field(validator=_SHAPE)
    momentum: tuple[float, float] | None = attrs.field(converter=_to_momentum, validator=_check_momentum)
    three_phase: bool = attrs.field(validator=boolean(hint="Torch's default is False."))
    _phases: tuple[_Phase, ...] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        initial_lr = self.max_lr / self.div_factor
        min_lr = initial_lr / self.final_div_factor
        if not math.isfinite(initial_lr):
            expected = f"such that max_lr / div_factor is finite (max_lr is {self.max_lr!r})"
            raise refuse(self, "div_factor", expected, self.div_factor, "Torch's default is 25.")
        if not math.isfinite(min_lr):
            expected = f"such that the last rate is finite (the first is {initial_lr!r})"
            raise refuse(self, "final_div_factor", expected, self.final_div_factor, "Torch's default is 1e4.")
        peak = self.pct_start * self.total_steps - 1
        last = float(self.total_steps - 1)
        base, top = self.momentum or (0.0, 0.0)

        def phase(start: float, end: float, shape: Shape, *rates: float) -> _Phase:
            lr = (rates[0], rates[1])
            momentum = (rates[2], rates[3]) if self.momentum else None
            return _Phase(start, end, shape == "cos", lr, momentum)

        up = phase(0.0, peak, self.rise, initial_lr, self.max_lr, top, base)
        phases: tuple[_Phase, ...]
        if self.three_phase:
            back = 2 * self.pct_start * self.total_steps - 2
            down = phase(peak, back, self.anneal, self.max_lr, initial_lr, base, top)
            phases = (up, down, phase(back, last, self.anneal, initial_lr, min_lr, top, top))
        else:
            phases = (up, phase(peak, last, self.anneal, self.max_lr, min_lr, base, top))
        object.__setattr__(self, "_phases", phases)

    def for_factor(self, factor: float) -> "OneCycle":  # noqa: ARG002  (what every schedule with absolute ends is asked)
        """The schedule of any group, as in torch: ``max_lr`` is the same in every group."""
        return self

    def __call__(self, step: int) -> float | Rates:
        """The rate, or rate and momentum, of the step after ``step`` (>= 0) applied ones."""
        if step >= self.total_steps:
            step = self.total_steps - 1
        for start, end, is_cosine, lr, momentum in self._phases:  # noqa: B007  the last phase ends at the last step
            if step <= end:
                break
        # A phase of no length is over as soon as it begins. Torch divides by zero here.
        part = (step - start) / (end - start) if end != start else 1.0
        rate = _anneal(lr, part, is_cosine)
        return rate if momentum is None else Rates(rate, _anneal(momentum, part, is_cosine))


def one_cycle(
    max_lr: float,
    *,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    anneal: Shape = "cos",
    rise: Shape | None = None,
    momentum: tuple[float, float] | None = None,
    three_phase: bool = False,
) -> OneCycle:
    """Rise to ``max_lr``, then fall to almost nothing, once in the whole run; torch's form, bit for bit.

    With T = ``total_steps``, the peak at step P = pct_start * T - 1 (not always whole), and u the part of a phase that
    is over, 0 at its start and 1 at its end:

        eta_first = max_lr / div_factor,    eta_last = eta_first / final_div_factor
        phase 1, from step 0 to P:          eta_first -> max_lr
        phase 2, from step P to T - 1:      max_lr -> eta_last
        a -> b:                             b + (a - b) / 2 * (1 + cos(pi * u)),   or the straight line a + (b - a) * u

    With ``three_phase`` phase 2 goes back to ``eta_first`` as slowly as phase 1 rose, until step 2 P, and phase 3 goes
    from there to ``eta_last`` at step T - 1. Both phases of torch's default are cosines; many texts draw a straight
    line upwards, which is ``rise="linear"``.

    Where it is not torch's: torch divides by zero when pct_start * T = 1; the rise has no length then, and step 0 has
    the peak. From step T on the last value is held; torch rises again at step T and raises at T + 1. As in torch,
    with pct_start * T < 1 the peak lies before step 0 and is not reached, and with pct_start = 1 there is no fall.

    Args:
        max_lr: the learning rate of the peak, >= 0.
        total_steps: T, in optimizer steps of the whole run, >= 1.
        pct_start: the part of T that rises, 0..1.
        div_factor: ``max_lr`` over the first rate, > 0.
        final_div_factor: the first rate over the last, > 0.
        anneal: the form of every phase (torch's ``anneal_strategy``).
        rise: the form of phase 1, where it is another than ``anneal``.
        momentum: ``(base, max)`` with 0 <= base <= max < 1 to cycle momentum (beta1 in Adam) the other way: max at
            step 0, base at the peak, max at the end, and max in a third phase. Torch cycles by default, (0.85, 0.95).
        three_phase: whether there is a third phase.

    Returns:
        A frozen schedule, ``step -> learning rate``, or ``step -> Rates`` where ``momentum`` is given.

    Raises:
        ConfigError: an argument is outside its range; the message names it.

    Source: Smith and Topin 2018, https://arxiv.org/abs/1708.07120; ``torch.optim.lr_scheduler.OneCycleLR``.

    Example:
        >>> rate = one_cycle(0.1, total_steps=100)
        >>> rate(0) < rate(30) > rate(99)
        True
    """
    return OneCycle(
        max_lr=max_lr,
        total_steps=total_steps,
        pct_start=pct_start,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
        anneal=anneal,
        rise=anneal if rise is None else rise,
        momentum=momentum,
        three_phase=three_phase,
    )
