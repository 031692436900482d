"""Where a run begins: its recipe, its first state, and what is recorded of them."""

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from steploop.recipe.recipe import Recipe
from steploop.runs.contract import Change, phase_record
from steploop.runs.initial_weights import with_initial_weights
from steploop.runs.monitoring import prepared
from steploop.runs.requests import Request
from steploop.runs.trial_evaluation import Weights, try_evaluation

__all__ = ["Beginning", "begin", "begin_anew"]

Note = Callable[[str], None]


@attrs.frozen(kw_only=True)
class Beginning:
    """Where the fold over a recipe's batches begins.

    Attributes:
        recipe: of the phase; its ``state`` is where to begin.
        phase: its number, from 0.
        loaded: whether the state is that of a checkpoint.
        record: the phase's record (see ``contract``).
        changes: what is not as it was.
        weights: which weights are evaluated, where a trial has shown it.
        before: the phase's record before a resume.
        unsaved: whether the state is another one than that of its checkpoint, so that it has to be saved first.
        ended: whether nothing is left to train or to evaluate.
        owed: whether the evaluation after the state's last step did not come to its end.
    """

    recipe: Recipe
    phase: int = 0
    loaded: bool = False
    record: Mapping[str, Any]
    changes: tuple[Change, ...] = ()
    weights: Weights | None = None
    before: Mapping[str, Any] = attrs.field(factory=dict)
    unsaved: bool = False
    ended: bool = False
    owed: bool = False


def begin(recipe: Recipe, *, phase: int = 0) -> Beginning:
    """Begin a phase with the recipe's own state, after a trial of its evaluation.

    Raises:
        ObjectiveError: the evaluation does not give numbers.
        ConfigError: it lacks what the recipe monitors.
    """
    recipe = attrs.evolve(recipe, state=prepared(recipe, recipe.state))
    weights = try_evaluation(recipe, recipe.state)
    return Beginning(recipe=recipe, phase=phase, record=phase_record(recipe), weights=weights)


def begin_anew(request: Request, note: Note) -> Beginning:
    """Begin a run: with the weights that are given, or with the recipe's own.

    Raises:
        CheckpointError: the weights that are given cannot be read, or do not fit.
        SteploopError: see ``begin``.
    """
    recipe = request.build()
    if request.init is not None:
        recipe = with_initial_weights(recipe, request.init, note)
    beginning = begin(recipe)
    if not beginning.record["restorable"]:
        note(
            "the stream cannot begin in the middle of an epoch: an interrupted run goes on at the epoch's beginning, by "
            "--restart-epoch"
        )
    return beginning
