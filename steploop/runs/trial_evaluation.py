"""Try the evaluation on one batch before the first step."""

import warnings
from typing import Literal

from steploop.core.ambient_generators import ambient_kept, generators_of_all_devices
from steploop.core.state.several import State
from steploop.core.steps.trial import trial_evaluations
from steploop.errors import SteploopError
from steploop.recipe.recipe import Recipe
from steploop.runs.metric_values import read_metrics
from steploop.runs.monitoring import refuse_missing

__all__ = ["Weights", "try_evaluation"]

Weights = Literal["raw", "average"]


def try_evaluation(recipe: Recipe, state: State) -> Weights | None:
    """Call ``recipe.evaluate`` once, each ``evaluate`` in it cut short after its first batch.

    Nothing is trained yet, so a mistake costs no training. The state and the generators stay as they are.

    Returns:
        Which weights were evaluated; None where the recipe does not say, by not calling ``evaluate`` or in both ways.

    Raises:
        ObjectiveError: it does not return numbers.
        ConfigError: the monitored metric is not among them.
    """
    if recipe.evaluate is None:
        return None
    with ambient_kept(generators_of_all_devices()), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a metric of a single batch may be undefined; the whole evaluation says so
        try:
            with trial_evaluations() as trial:
                returned = recipe.evaluate(state)
        except SteploopError:
            raise
        except Exception:  # noqa: BLE001  (it may need more than a batch, such as samples of every class)
            returned = recipe.evaluate(state)
    refuse_missing(recipe, read_metrics(returned))
    used = set(trial.averaged)
    return None if len(used) != 1 else "average" if used.pop() else "raw"
