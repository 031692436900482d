"""The learning-rate range test: raise the rate step by step, and see where the loss falls."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from steploop.core.state.several import State
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import set_rates
from steploop.core.trees import to_device
from steploop.core.validators import integer, real, refuse, to_integer, to_real
from steploop.errors import ConfigError, EmptyDataError
from steploop.recipe.recipe import Recipe
from steploop.runs.monitoring import prepared

__all__ = ["RangeTest", "RangeTestResult", "range_test", "suggest"]

_RATE = real(above=0.0, hint="Common tests run from 1e-6 to 10.")


@attrs.frozen(kw_only=True)
class RangeTest:
    """The settings of a range test.

    Step i of n has the rate  low * (high / low) ** (i / (n - 1)). The curve is smoothed by the mean over a window that
    is centred, and so has no lag: an average of past losses alone would put the fall at too high a rate. The test ends
    where the loss is not finite, or where its mean over the last window has risen to ``stop_factor`` times the lowest.

    Attributes:
        low: the first learning rate, > 0.
        high: the last one, > low.
        steps: n, >= 10.
        window: steps that a mean is taken over, >= 1; odd ones are symmetric.
        stop_factor: when to give up, > 1.

    Source: Smith 2017, https://arxiv.org/abs/1506.01186; the stop is fastai's.
    """

    low: float = attrs.field(default=1e-6, converter=to_real, validator=_RATE)
    high: float = attrs.field(default=10.0, converter=to_real, validator=_RATE)
    steps: int = attrs.field(
        default=100, converter=to_integer, validator=integer(at_least=10, hint="100 draw a clear curve.")
    )
    window: int = attrs.field(
        default=7, converter=to_integer, validator=integer(at_least=1, hint="1 does not smooth.")
    )
    stop_factor: float = attrs.field(
        default=4.0, converter=to_real, validator=real(above=1.0, hint="fastai and others give 4.")
    )

    def __attrs_post_init__(self) -> None:
        """Check that the rates rise."""
        if not self.low < self.high:
            raise refuse(self, "high", f"> low ({self.low!r})", self.high, "The rates rise from low to high.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return float(self.low * (self.high / self.low) ** (step / (self.steps - 1)))


@attrs.frozen(kw_only=True)
class RangeTestResult:
    """The result of a range test.

    Attributes:
        rates: the learning rate of each step that was made.
        losses: the loss of each; None where it was not finite.
        smooth: the same smoothed.
        suggestion: a learning rate, or None where the loss never fell.
        rule: the sentence that gave it.
    """

    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    smooth: tuple[float | None, ...]
    suggestion: float | None
    rule: str


def centred_means(values: Sequence[float | None], window: int) -> tuple[float | None, ...]:
    """Average each value with its neighbours within ``window``; None stays None."""
    half = window // 2
    found: list[float | None] = []
    for i, value in enumerate(values):
        reach = min(half, i, len(values) - 1 - i)
        near = [v for v in values[i - reach : i + reach + 1] if v is not None]
        found.append(None if value is None else sum(near) / len(near))
    return tuple(found)


def suggest(rates: tuple[float, ...], smooth: tuple[float | None, ...]) -> tuple[float | None, str]:
    """Find the rate at which the smoothed loss falls fastest per decade, before its minimum.

    The slope is the central difference over log10 of the rate. The first tenth of the steps, where nearly nothing is
    learnt, does not count.

    Returns:
        The suggestion, or None, and the rule in words.
    """
    points = [(r, v) for r, v in zip(rates, smooth, strict=True) if v is not None]
    start = max(len(points) // 10, 1)
    lowest = min(range(len(points)), key=lambda i: points[i][1], default=0)
    slopes = [
        ((points[i + 1][1] - points[i - 1][1]) / math.log10(points[i + 1][0] / points[i - 1][0]), i)
        for i in range(start, min(lowest + 1, len(points) - 1))
    ]
    if not slopes or min(slopes)[0] >= 0.0:
        return (
            None,
            "The loss did not fall at any rate: begin lower, take more steps, or look for a fault in the recipe.",
        )
    _, best = min(slopes)
    bottom = points[lowest][0]
    rule = (
        "the smoothed loss falls fastest per decade of the learning rate there; it is lowest at "
        f"{bottom:.2g}, from where on it rises"
    )
    return points[best][0], rule


def range_test(
    recipe: Recipe,
    plan: RangeTest | None = None,
    *,
    which: str | None = None,
    tell: Callable[[int, float], None] = lambda *_: None,
) -> RangeTestResult:
    """Run a range test on a copy of a recipe's state, with its own train step and batches.

    The state of the recipe is as it was afterwards, and its model computes with it.

    Args:
        recipe: whose ``state``, ``train_step`` and ``batches`` are used; the batches begin again where they end.
        plan: rates and steps; None: `RangeTest` with its defaults.
        which: for a recipe that trains several states, the one whose rate is varied; the others keep theirs.
        tell: called after each step with its number and its loss.

    Raises:
        ConfigError: ``which`` names no state or is missing, or the train step sets its own rate before it uses it.
        EmptyDataError: the recipe has no batches.
    """
    plan = plan or RangeTest()
    several = isinstance(recipe.state, Mapping)
    names = list(recipe.state) if isinstance(recipe.state, Mapping) else []
    if several and which not in names:
        raise ConfigError(
            f"lr-find: this recipe trains several states ({', '.join(names)}). Say whose rate to vary, as with --state {names[0]}."
        )
    if not several and which is not None:
        raise ConfigError(
            f"lr-find: this recipe trains one state, but --state {which} was given. Leave it out."
        )
    state = _copied(prepared(recipe, recipe.state))
    used = _UsedRates(_one(state, which))
    rates: list[float] = []
    losses: list[float | None] = []
    best = math.inf
    with used:
        for step, batch in enumerate(itertools.islice(_endless(recipe), plan.steps)):
            rate = plan.rate(step)
            state = _with_rate(state, which, rate)
            state = recipe.train_step(state, to_device(batch, _one(state, which).device))
            used.check(rate)
            loss = _one(state, which).loss
            value = math.nan if loss is None else loss.item()
            rates.append(rate)
            if not math.isfinite(value):
                losses.append(None)
                break
            losses.append(value)
            tell(step, value)
            last = [v for v in losses[-plan.window :] if v is not None]
            current = sum(last) / len(last)
            best = min(best, current)
            if step >= plan.steps // 10 and current > best + (plan.stop_factor - 1) * abs(best):
                break
    smooth = centred_means(losses, plan.window)
    suggestion, rule = suggest(tuple(rates), smooth)
    return RangeTestResult(
        rates=tuple(rates), losses=tuple(losses), smooth=smooth, suggestion=suggestion, rule=rule
    )


def _copied(state: State) -> State:
    return {name: one.clone() for name, one in state.items()} if isinstance(state, Mapping) else state.clone()


def _one(state: State, which: str | None) -> TrainState:
    return state[which or ""] if isinstance(state, Mapping) else state


def _with_rate(state: State, which: str | None, rate: float) -> State:
    if isinstance(state, Mapping):
        return {name: _at_rate(one, rate) if name == which else one for name, one in state.items()}
    return _at_rate(state, rate)


def _at_rate(state: TrainState, rate: float) -> TrainState:
    """Set the rate, in the plateau too: a train step may take it from there."""
    if state.plateau is not None:
        state = attrs.evolve(state, plateau=attrs.evolve(state.plateau, learning_rate=rate))
    return set_rates(state, rate)


def _endless(recipe: Recipe) -> Iterator[Any]:
    """Yield batches, epoch after epoch."""
    for epoch in itertools.count():
        batches = recipe.batches.epoch(epoch)
        empty = True
        try:
            for batch in batches:
                empty = False
                yield batch
        finally:
            if (close := getattr(batches, "close", None)) is not None:
                close()
        if empty:
            raise EmptyDataError(
                "lr-find: the recipe's batches are empty: there is nothing to test a learning rate on."
            )


class _UsedRates:
    """Reads the rate that the optimizer really uses, by a hook during the test."""

    def __init__(self, state: TrainState) -> None:
        self._optimizer = state.machine.optimizer
        self._factor = state.machine.rate_factors[0]
        self._seen: float | None = None

    def __enter__(self) -> None:
        def look(optimizer: Any, *_: Any) -> None:
            self._seen = float(optimizer.param_groups[0]["lr"])

        self._handle = self._optimizer.register_step_pre_hook(look)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def check(self, rate: float) -> None:
        """Raise ConfigError if the last step used another rate; a skipped step used none."""
        if self._seen is not None and not math.isclose(self._seen, rate * self._factor, rel_tol=1e-6):
            raise ConfigError(
                f"lr-find: the train step was given the learning rate {rate:g}, but the optimizer used {self._seen / self._factor:g}. "
                "Its schedule must be its last line: schedule(state, ...) sets the rate of the next step."
            )
        self._seen = None
