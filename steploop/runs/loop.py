"""The loop: ``reduce(train_step, batches, state)`` for each epoch, and what happens between two steps.

Nothing in here changes what is trained: logging, checkpoints and signals look at the state; only the fold over an
evaluation's metrics, and the cursor, write to it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import reduce
from typing import Any

from steploop.core.interruption import Interrupted
from steploop.core.state.several import State, members
from steploop.data.batches import epoch_of_parts
from steploop.errors import EmptyDataError, NonFiniteError
from steploop.recipe.recipe import Recipe
from steploop.runs.due import Due
from steploop.runs.evaluations import Evaluations
from steploop.runs.layer_norms import LayerNorms
from steploop.runs.members import (
    arranged,
    at_position,
    attempted_steps,
    lead,
    next_epoch,
    place_of,
)
from steploop.runs.monitoring import ending_of, stopped
from steploop.runs.pace import Pace
from steploop.runs.plan import Ending, Journal, Keeper, Plan, Witness
from steploop.runs.ranks.team import Team
from steploop.runs.signals import StopFlag
from steploop.runs.skips import SkipReporter
from steploop.runs.step_metrics import read_step

__all__ = ["Loop"]

_NOTHING = object()  # no batch


class Loop:
    """One recipe, folded over its batches from wherever its state stands.

    Args:
        recipe: what to train; its ``state`` is where to begin.
        plan: see `Plan`.
        journal: gets each log point, evaluation and event.
        keeper: given the states to keep.
        stop: looked at between two steps.
        begun_s: ``time.perf_counter()`` at the start of the run, for the times in the journal.
        witness: shown each step; None: steps that are skipped are only counted.
        team: the ranks that train together.
        looked: whether there is nothing to look at in the state as it is: it is new, or its evaluation is in the log.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        plan: Plan,
        journal: Journal,
        keeper: Keeper,
        stop: StopFlag,
        begun_s: float,
        witness: Witness | None = None,
        team: Team | None = None,
        looked: bool = True,
    ) -> None:
        self._team = team or Team()
        self._looked = looked
        self._recipe = recipe
        self._plan = plan
        self._journal = journal
        self._keeper = keeper
        self._stop = stop
        self._pace = Pace(begun_s)
        self._skips = SkipReporter(recipe.batches, witness, journal)
        self._norms: LayerNorms | None = None
        self._stretch: Callable[..., Any] | None = getattr(recipe.train_step, "stretch", None)  # if compiled
        self._steps_per_epoch = len(recipe.batches)
        if self._steps_per_epoch == 0:
            raise EmptyDataError(
                "The recipe's batches are empty: there is nothing to train on. Look at the size of the data and at drop_last."
            )
        self._due = Due(plan, recipe.eval_every_steps, self._steps_per_epoch)
        self._ending: Ending | None = None
        self._names: tuple[str, ...] = ("",)
        self._position = 0
        self._attempted = 0
        self._taken = False
        self.evaluations = Evaluations(recipe, journal, keeper, stop, self._pace, team=self._team)

    def run(self, state: State, *, evaluation_due: bool = False) -> tuple[State, Ending]:
        """Train to the end, or until the run is asked to stop.

        Args:
            state: where to begin; its cursor says at which batch.
            evaluation_due: whether the evaluation after the state's last step was interrupted.

        Returns:
            The last state and why it is the last. It has been given to the keeper.
        """
        self._attempted = attempted_steps(state)
        self._names = tuple(members(state))
        if evaluation_due:
            best = lead(state).best
            state = self._evaluated(state, between_steps=True)
            self._keeper.save(state, best=lead(state).best is not best)
        depth = self._plan.layer_norms
        with nullcontext() if depth is None else LayerNorms(state, depth=depth) as self._norms:
            while self._ending is None:
                self._ending = ending_of(self._recipe, state, self._plan.limit_steps)
                if self._ending is None:
                    self._taken = True
                    state = self._epoch(state)
        return self._closed(state), self._ending

    @property
    def idle(self) -> bool:
        """Whether nothing was left to train or to evaluate."""
        return not self._taken and self.evaluations.last < 0

    def _epoch(self, state: State) -> State:
        """The fold over the rest of an epoch."""
        epoch, start = lead(state).epoch, lead(state).batch
        self._position = start
        if start < self._steps_per_epoch:
            batches = epoch_of_parts(self._recipe.batches, lead(state).ranks, epoch, start)
            self._pace.go()
            try:
                state = self._folded(state, self._until_told(batches))
            finally:
                self._pace.stand()
                if (close := getattr(batches, "close", None)) is not None:
                    close()
            if self._position == 0 and self._ending is None:
                raise EmptyDataError(
                    f"Epoch {epoch + 1} has not a single batch, although len(batches) is {self._steps_per_epoch}."
                )
        if self._is_over():
            return state
        before = lead(state).best
        if self.evaluations.comes_after_epoch(state):
            self._keeper.save(state, best=False)  # a failing or killed evaluation costs no training
            state = self._evaluated(state)
            if self._is_over():  # interrupted: the cursor stays behind the last batch, and a resume evaluates
                return state
        state = next_epoch(state)
        self._keeper.save(state, best=lead(state).best is not before)
        return state

    def evaluates_first(self, state: State, *, due: bool) -> bool:
        """Whether a run that begins with ``state`` begins with an evaluation, which may be in its log already."""
        whole = lead(state).batch == self._steps_per_epoch
        return due or (whole and self.evaluations.comes_after_epoch(state))

    def _until_told(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, until there is a reason to stop; counts the time they make us wait."""
        iterator = iter(batches)
        while self._ending is None:
            if self._stop.signum is not None:  # before the first batch, or in the middle of a stretch
                self._ending = "interrupted"
                return
            begun = time.perf_counter()
            self._stop.interruptible = True
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Interrupted:
                self._ending = "interrupted"
                return
            finally:
                self._stop.interruptible = False
            self._pace.waited(time.perf_counter() - begun)
            self._pace.trained(batch)
            self._team.at(self._attempted + 1)
            yield batch

    def _folded(self, state: State, batches: Iterator[Any]) -> State:
        """The fold over the batches; of a compiled step in stretches that end where something is due."""
        if self._stretch is None:
            return reduce(self._step, batches, state)
        batch = next(batches, _NOTHING)
        while batch is not _NOTHING and self._ending is None:
            following: tuple[Any, ...] = ()
            if (most := 1 if self._norms is not None else self._due.steps_left(self._attempted)) == 1:
                state = self._step(state, batch)
            else:
                try:
                    taken = self._stretch(state, batch, batches, most=most)
                except NonFiniteError as error:  # the first step of a stretch is the one that may raise
                    raise self._named(error, state, batch) from error.__cause__
                if taken.steps > 1:
                    self._skips.went_well()  # all steps but the last
                following = taken.following
                state = self._after(taken.before, taken.state, taken.batch, steps=taken.steps)
            batch = following[0] if following else next(batches, _NOTHING)
        return state

    def _step(self, state: State, batch: Any) -> State:
        """A train step, and what is due after it."""
        if self._norms is not None and self._due.line(self._attempted, self._attempted + 1):
            self._norms.request()
        try:
            new = self._recipe.train_step(state, batch)
        except NonFiniteError as error:
            raise self._named(error, state, batch) from error.__cause__
        return self._after(state, new, batch)

    def _named(self, error: NonFiniteError, given: State, batch: Any) -> NonFiniteError:
        """The error of a step that ends the run, completed."""
        epoch, number = lead(given).epoch, self._position
        self._skips.see_raised(error, given, batch, epoch, number)
        return self._skips.named(error, epoch, number)

    def _after(self, given: State, new: Any, batch: Any, *, steps: int = 1) -> State:
        """What is due after steps: with what went into the last one, what came out, and its batch."""
        self._position += steps
        state = at_position(arranged(new, self._names), self._position)
        before, self._attempted = self._attempted, attempted_steps(state)
        now = self._attempted
        due = self._due.line(before, now)
        self._skips.see(given, state, batch, lead(given).epoch, self._position - 1, wait=due)
        if due:
            self._log(state, batch)
        improved = False
        if self._due.evaluation(before, now):
            best = lead(state).best
            state = self._evaluated(state, between_steps=True)
            improved = lead(state).best is not best
            if stopped(state):
                self._ending = "early_stop"
        # at the end of an epoch, the checkpoint after its evaluation is the one that counts
        if improved or (self._due.checkpoint(before, now) and self._position < self._steps_per_epoch):
            self._keeper.save(state, best=improved)
        self._stop.agree()
        if self._stop.signum is not None:
            self._ending = "interrupted"
        elif self._due.end(now) and self._position < self._steps_per_epoch:
            self._ending = self._ending or "limit"
        return state

    def _is_over(self) -> bool:
        return self._ending is not None

    def _log(self, state: State, batch: Any) -> None:
        values = read_step(state, batch, self._recipe.train_metrics)  # waits for the device: times are honest
        if self._norms is not None:
            values |= {f"layer_norm/{group}": norm for group, norm in self._norms.read().items()}
        self._journal.train({**place_of(state), **values, **self._pace.read()})

    def _evaluated(self, state: State, *, between_steps: bool = False, fold: bool = True) -> State:
        """The state after an evaluation; as it was if a signal came, with ``_ending`` set."""
        if self._recipe.evaluate is None:
            return state
        evaluated = self.evaluations.evaluate(state, between_steps=between_steps, fold=fold)
        if evaluated is None:
            self._ending = "interrupted"
            return state
        return evaluated

    def _closed(self, state: State) -> State:
        """The last state, kept; looked at once more where its last step was not evaluated."""
        looked = self.evaluations.last == self._attempted or (self._looked and not self._taken)
        if self._ending == "limit" and not looked:
            # this look leaves no trace in the state: a resume goes on as if it never stopped
            self._evaluated(state, fold=False)
        self._keeper.save(state, best=False)
        return state
