"""Evaluate a state during a run: measure, update best and early stopping, write the metrics down."""

import time
from collections.abc import Mapping
from typing import Any

from steploop.checkpoint import digest
from steploop.core.interruption import Interrupted
from steploop.core.state.several import State
from steploop.recipe.recipe import Recipe
from steploop.runs.members import attempted_steps, lead, next_epoch, place_of
from steploop.runs.metric_values import read_metrics
from steploop.runs.monitoring import fold_metrics, stopped
from steploop.runs.pace import Pace
from steploop.runs.plan import Journal, Keeper
from steploop.runs.ranks.team import Team
from steploop.runs.signals import StopFlag

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one recipe.

    Args:
        recipe: what is trained.
        journal: gets each evaluation.
        keeper: given the state where an evaluation fails.
        stop: ends an evaluation between two of its batches.
        pace: the watch of training, which stands meanwhile.
        team: the ranks that train together; what rank 0 measured decides for all.

    Attributes:
        metrics: of the last one; empty before the first.
        last: attempted steps at the last one; -1 before the first.
        due: the digest of the state whose evaluation did not come to its end, where its cursor does not say so.
    """

    def __init__(
        self, recipe: Recipe, journal: Journal, keeper: Keeper, stop: StopFlag, pace: Pace, *, team: Team
    ) -> None:
        self._team = team
        self._recipe = recipe
        self._journal = journal
        self._keeper = keeper
        self._stop = stop
        self._pace = pace
        self.metrics: Mapping[str, float | None] = {}
        self.last = -1
        self.due: str | None = None

    def evaluate(self, state: State, *, between_steps: bool = False, fold: bool = True) -> State | None:
        """Evaluate a state.

        Args:
            state: it changes by what its metrics decide.
            between_steps: whether it comes between two steps. After an epoch, the cursor stays behind the last batch, and
                that says to a resume that the evaluation is due.
            fold: whether metrics decide anything.

        Returns:
            The state afterwards; None where a signal came in between.

        Raises:
            ObjectiveError: ``evaluate`` does not return numbers. The state is kept, as after any other error.
        """
        assert self._recipe.evaluate is not None  # noqa: S101  (the loop has asked)
        trained = self._pace.stand()
        begun = time.perf_counter()
        try:
            with self._stop.interruption_allowed():
                measured = read_metrics(self._recipe.evaluate(state))
                metrics = self._team.by_first(lambda: measured)
        except (Interrupted, Exception) as error:
            if between_steps:
                self.due = digest(state)  # once it is folded, the digest is another
            if isinstance(error, Interrupted):
                return None
            if not self._team.several:  # ranks save together, and the others may not have failed
                self._keeper.save(state, best=False)  # a mistake in an evaluation costs no training
            raise
        taken = time.perf_counter() - begun
        if trained:
            self._pace.go()
        self.metrics, self.last, better = metrics, attempted_steps(state), False
        if fold:
            state, better = fold_metrics(self._recipe, state, metrics)
        self._journal.evaluation({
            **self._place(state), "metrics": metrics, "best": better, "time_s": self._pace.time_s, "eval_s": taken,
        })  # fmt: skip
        if fold and stopped(state):
            self._journal.event({"event": "early_stop", **self._place(state)})
        return state

    def comes_after_epoch(self, state: State) -> bool:
        """Whether an evaluation is due between the last step of the state's epoch and its checkpoint."""
        every = self._recipe.eval_every_steps
        if self._recipe.evaluate is None:
            return False
        if every is None:
            return True
        # a last step of all between two evaluations counts as one. It is folded before the state is kept, so that a run
        # that is killed at its very end makes up for it, and one that has ended does not evaluate again
        attempted = attempted_steps(state)
        seen = self.last == attempted or attempted % every == 0
        return lead(state).epoch + 1 >= self._recipe.epochs and not seen

    def _place(self, state: State) -> dict[str, Any]:
        """The place of an evaluation, before which an epoch whose batches are used up is whole."""
        return place_of(next_epoch(state) if lead(state).batch == len(self._recipe.batches) else state)
