"""Train the phases of a run one after the other, with their checkpoints and logs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

from steploop.checkpoint import digest
from steploop.core.state.several import State
from steploop.recipe.recipe import Logger, Recipe
from steploop.runs.beginning import Beginning, begin
from steploop.runs.capsules.capsule_writer import CapsuleWriter
from steploop.runs.compile_option import CompiledBefore, compiled
from steploop.runs.journal import RunJournal
from steploop.runs.logs.screens import Screen
from steploop.runs.loop import Loop
from steploop.runs.members import attempted_steps, place_of
from steploop.runs.outlets import Outlets
from steploop.runs.past import Past
from steploop.runs.plan import Ending
from steploop.runs.ranks.team import Team
from steploop.runs.requests import Request
from steploop.runs.run_checkpoints import CheckpointKeeper
from steploop.runs.signals import StopFlag
from steploop.runs.start_record import record_phase

__all__ = ["Folded", "Phases"]


@attrs.frozen(kw_only=True)
class Folded:
    """What a fold came to.

    Attributes:
        state: the last one.
        recipe: of the last phase.
        ending: why it ended.
        metrics: of the last evaluation; empty where there was none.
        idle: whether nothing was left to do.
    """

    state: State
    recipe: Recipe
    ending: Ending
    metrics: Mapping[str, float | None]
    idle: bool


class Phases:
    """The phases of a run.

    Args:
        request: what was asked.
        outlets: where the run is recorded.
        screen: where it is shown.
        stop: which signal came, if one did.
        loggers: besides those of the recipe.
        zero_s: ``time.perf_counter()`` when the run began; before a resume lies the time of the process before.
        past: what the process before a resume has left.
        team: the ranks that train together.
    """

    def __init__(
        self,
        request: Request,
        outlets: Outlets,
        screen: Screen,
        stop: StopFlag,
        loggers: Sequence[Logger],
        *,
        zero_s: float,
        past: Past,
        team: Team,
    ) -> None:
        self._team = team
        self._request = request
        self._loggers = loggers
        self._outlets = outlets
        self._screen = screen
        self._stop = stop
        self._zero_s = zero_s
        self._past = past

    def fold(self, beginning: Beginning) -> Folded:
        """Fold a phase, and what follows it."""
        idle, metrics = True, dict[str, float | None]()
        while True:
            folded = self._phase(beginning)
            idle, metrics = idle and folded.idle, {**(folded.metrics or metrics)}
            recipe = folded.recipe
            if recipe.then is None or folded.ending == "interrupted":
                return attrs.evolve(folded, idle=idle, metrics=metrics)
            following = self._request.with_ranks(recipe.then(folded.state))
            beginning = begin(following, phase=beginning.phase + 1)
            if self._team.first:
                record_phase(self._request.directory, beginning)

    def _phase(self, beginning: Beginning) -> Folded:
        recipe, phase, screen, outlets = beginning.recipe, beginning.phase, self._screen, self._outlets
        if self._team.first:
            outlets.loggers.add((*self._loggers, *recipe.loggers), self._request.directory.path)
        keeper = self._keeper(recipe, phase)
        journal = RunJournal(
            outlets.lines,
            outlets.loggers,
            outlets.logged,
            screen,
            steps_per_epoch=len(recipe.batches),
            epochs=recipe.epochs,
            phase=phase,
            on_evaluation=lambda line: outlets.tell(line, recipe.monitor),
        )
        state = recipe.state
        if beginning.loaded and beginning.unsaved and not beginning.ended:
            self._save_first(beginning, keeper)
        elif beginning.loaded:
            keeper.goes_on_from(state)
        elif phase:
            keeper.save(state, best=False)  # so that a resume finds this phase begun
        elif self._request.resume:  # it was ended before its first checkpoint: it begins anew
            outlets.keep(lambda _: False)
        loop = Loop(
            compiled(recipe, self._compile(beginning), journal, screen, self._compiled_before(beginning)),
            plan=self._request.plan,
            journal=journal,
            keeper=keeper,
            stop=self._stop,
            begun_s=self._zero_s,
            witness=CapsuleWriter(
                self._request.directory.path, phase=phase, report=screen.note, ranks=self._team.control
            ),
            team=self._team,
            looked=not beginning.loaded or (phase, attempted_steps(state)) in self._past.evaluated,
        )
        if beginning.loaded:
            self._go_on(beginning, journal, loop)
        try:
            state, ending = loop.run(state, evaluation_due=beginning.owed)
        finally:
            if (due := loop.evaluations.due) is not None:
                outlets.say(evaluation_due=due)
            keeper.settle()
            if (close := getattr(recipe.batches, "close", None)) is not None:
                close()  # workers that were kept for the next epoch
        return Folded(
            state=state, recipe=recipe, ending=ending, metrics=loop.evaluations.metrics, idle=loop.idle
        )

    def _keeper(self, recipe: Recipe, phase: int) -> CheckpointKeeper:
        told: dict[str, Any] = {}
        if self._team.first:
            told = {
                "before_save": self._outlets.flush,
                "on_saved": lambda path, best: self._outlets.say(
                    checkpoint=path.name, **({"best_checkpoint": best.name} if best else {})
                ),
            }
        directory, ranks = self._request.directory.checkpoints(phase), self._request.ranks
        return CheckpointKeeper(directory, frozen=recipe.save_frozen, ranks=ranks, **told)

    def _save_first(self, beginning: Beginning, keeper: CheckpointKeeper) -> None:
        """Save what a resume has changed before anything else, so that a kill or a signal does not undo it."""
        keeper.save(beginning.recipe.state, best=False)
        keeper.settle()
        if self._team.first:
            record_phase(self._request.directory, beginning)
        if beginning.owed:
            self._outlets.say(evaluation_due=digest(beginning.recipe.state))

    def _compile(self, beginning: Beginning) -> bool | Literal["auto"]:
        if self._request.vectorised:  # the population is compiled
            return False
        return beginning.recipe.compile if self._request.compile is None else self._request.compile

    def _compiled_before(self, beginning: Beginning) -> CompiledBefore:
        """What compiling decided before a resume: it stays so, as the bits depend on it."""
        if not beginning.loaded:
            return CompiledBefore()
        given_anew = any(change.kind in {"compile", "recipe"} for change in beginning.changes)
        same_device = str(self._request.device) == self._request.recorded.get("device")
        return CompiledBefore(
            form=self._past.compiled if same_device and not given_anew else None,
            seen=self._past.forms_seen(beginning.phase, attempted_steps(beginning.recipe.state)),
        )

    def _go_on(self, beginning: Beginning, journal: RunJournal, loop: Loop) -> None:
        """Drop the lines of what will be done again, the last evaluation perhaps, and say where the run goes on."""
        state = beginning.recipe.state
        place = place_of(state)
        if beginning.ended:
            return
        attempted, phase = place["attempted"], beginning.phase
        again = loop.evaluates_first(state, due=beginning.owed)

        def stands(line: Mapping[str, Any]) -> bool:
            at = tuple(n if type(n := line.get(name)) is int else 0 for name in ("phase", "attempted"))
            return at < (phase, attempted) or (
                at == (phase, attempted) and not (again and line.get("kind") == "eval")
            )

        self._outlets.keep(stands)
        changed = {change.name: [change.before, change.now] for change in beginning.changes}
        journal.event({"event": "resumed", **place, **({"changed": changed} if changed else {})})
        where = (
            f"batch {place['batch']} of epoch {place['epoch']}"
            if place["batch"]
            else f"epoch {place['epoch']} is done"
        )
        self._screen.note(f"going on after step {attempted} ({where})")
