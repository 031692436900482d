"""Update best, early stopping and plateau of a state with the metrics of an evaluation."""

import math
from collections.abc import Mapping

from steploop.core.early_stopping import keep_best
from steploop.core.state.several import State
from steploop.errors import ConfigError
from steploop.recipe.config_values import nearest
from steploop.recipe.recipe import Recipe
from steploop.runs.members import attempted_steps, lead, with_lead
from steploop.runs.plan import Ending

__all__ = ["ending_of", "fold_metrics", "prepared", "refuse_missing", "stopped"]


def prepared(recipe: Recipe, state: State) -> State:
    """Give the state that a run starts from: with a beginning for early stopping and plateau, where the recipe has them."""
    first = lead(state)
    if recipe.early_stopping is not None and first.early_stopping is None:
        state = with_lead(state, early_stopping=recipe.early_stopping.init())
    if recipe.plateau is not None and first.plateau is None:
        state = with_lead(state, plateau=recipe.plateau.init())
    return state


def stopped(state: State) -> bool:
    """Whether early stopping has ended this run."""
    fold = lead(state).early_stopping
    return fold is not None and fold.stopped


def ending_of(recipe: Recipe, state: State, limit_steps: int | None) -> Ending | None:
    """Why a run is over whose state is at the end of a step or an epoch; None where there is more to train."""
    if stopped(state):
        return "early_stop"
    if lead(state).epoch >= recipe.epochs:
        return "finished"
    return "limit" if limit_steps is not None and attempted_steps(state) >= limit_steps else None


def fold_metrics(recipe: Recipe, state: State, metrics: Mapping[str, float | None]) -> tuple[State, bool]:
    """The state after an evaluation, and whether its monitored metric is the best so far.

    Raises:
        ConfigError: a metric that the recipe monitors is not among those its evaluation gives.
    """
    refuse_missing(recipe, metrics)
    first = lead(state)
    best = first.best
    if recipe.monitor is not None:
        value = _value(metrics, recipe.monitor)
        judged = value if _may_be_best(first.step, metrics) else math.nan
        best = keep_best(first.best, judged, step=first.step, epoch=first.epoch, mode=recipe.mode)
        if recipe.plateau is not None and first.plateau is not None:
            state = with_lead(state, plateau=recipe.plateau.update(first.plateau, value))
    if recipe.early_stopping is not None and first.early_stopping is not None:
        value = _value(metrics, recipe.early_stopping.monitor)
        state = with_lead(state, early_stopping=recipe.early_stopping.update(first.early_stopping, value))
    return with_lead(state, best=best), best is not first.best


def refuse_missing(recipe: Recipe, metrics: Mapping[str, float | None]) -> None:
    """Check that the metrics hold what the recipe monitors.

    Raises:
        ConfigError: one is missing; the nearest name is said.
    """
    stopping = recipe.early_stopping
    monitored = {"Recipe(monitor=...)": recipe.monitor}
    monitored |= {"EarlyStopping(monitor=...)": None if stopping is None else stopping.monitor}
    for where, name in monitored.items():
        if name is not None and name not in metrics:
            raise ConfigError(
                f"{where} names {name!r}, which evaluate does not give. {nearest(name, list(metrics))}"
            )


def _value(metrics: Mapping[str, float | None], name: str) -> float:
    value = metrics[name]
    return math.nan if value is None else float(value)


def _may_be_best(step: int, metrics: Mapping[str, float | None]) -> bool:
    """Whether an evaluation can be the best: something was trained, and no loss is NaN."""
    losses = [value for name, value in metrics.items() if name.endswith("loss")]
    return step > 0 and not any(value is not None and math.isnan(value) for value in losses)
