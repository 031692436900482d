"""A run from its beginning to its end: builds the recipe, owns the directory, folds phase after phase, says how it went."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from steploop.checkpoint import digest
from steploop.core.interruption import Interrupted
from steploop.errors import CheckpointWriteError, SteploopError
from steploop.recipe.recipe import Logger, Recipe, State
from steploop.runs.allocator import tune_allocator
from steploop.runs.capsules.capsule_writer import CapsuleWriter
from steploop.runs.compile_option import compiled
from steploop.runs.directory import Status, clear_unfinished, forget, read_status, refuse_taken
from steploop.runs.directory_lock import run_lock
from steploop.runs.journal import RunJournal
from steploop.runs.logs import read_json_lines
from steploop.runs.logs.screens import Screen
from steploop.runs.loop import Loop
from steploop.runs.members import place_of
from steploop.runs.monitoring import prepared
from steploop.runs.outlets import Outlets, open_outlets
from steploop.runs.plan import Ending
from steploop.runs.requests import Request
from steploop.runs.run_checkpoints import CheckpointKeeper
from steploop.runs.signals import StopFlag, signals_as
from steploop.runs.standard_streams import lasting_streams
from steploop.runs.start_record import announce, record
from steploop.runs.summary import Summary, summarize

__all__ = ["carry_out"]


def carry_out(
    request: Request, screen: Screen, stop: StopFlag | None = None, loggers: Sequence[Logger] = ()
) -> Summary:
    """Run a recipe to its end, or until a signal.

    Args:
        request: what and how.
        screen: where progress is shown; it is closed at the end.
        stop: the flag that signals set.
        loggers: besides those of the recipe.

    Raises:
        RunLockedError: another process trains in this directory.
        RunExistsError: the directory holds something, and this is no resume.
        SteploopError: whatever went wrong; status.json says it too.
        Interrupted: a signal came before there was anything to save.
    """
    stop = stop or StopFlag()
    stop.at_once = False  # the directory is there: what comes now is seen where it can be taken away again
    try:
        with lasting_streams(), signals_as(stop), run_lock(request.directory.path):
            if not request.resume:
                refuse_taken(request.directory)
            clear_unfinished(request.directory)
            try:
                return _Run(request, screen, stop, loggers).run()
            finally:
                screen.close()
    except CheckpointWriteError:
        forget(request.directory, keep_if_begun=True)  # not even the lock could be written
        raise


# what a resume takes over from the status before, until it knows better
_KEPT = ("step", "epoch", "metrics", "best", "checkpoint", "best_checkpoint", "evaluation_due")


class _Run:
    """The parts of a run while it lasts."""

    def __init__(self, request: Request, screen: Screen, stop: StopFlag, loggers: Sequence[Logger]) -> None:
        self._request = request
        self._directory = request.directory
        self._screen = screen
        self._loggers = loggers
        self._stop = stop
        self._begun_s = time.perf_counter()
        self._past = list(read_json_lines(self._directory.metrics)) if request.resume else []
        spent = max((line.get("time_s", 0.0) for line in self._past), default=0.0)
        self._zero_s = self._begun_s - spent
        self._metrics: Mapping[str, float | None] = next(
            (line["metrics"] for line in reversed(self._past) if line["kind"] == "eval"), {}
        )

    def run(self) -> Summary:
        """Build, train, say how it went."""
        tuning = tune_allocator() if self._request.tune else {}
        before = read_status(self._directory) if self._request.resume else {}
        due = before.get("evaluation_due")
        try:
            with self._nothing_to_save():
                recipe = self._request.recipe.build(self._request.config, self._request.device)
                record(self._request, recipe, tuning)
                announce(self._request, recipe, self._screen)
            status = Status(
                self._directory, monitor=recipe.monitor, **{k: before[k] for k in _KEPT if k in before}
            )
            outlets = open_outlets(self._request, status, self._screen.note)
        except BaseException:
            if not self._request.resume:
                forget(self._directory)
            raise
        try:
            state, recipe, ending = self._phases(recipe, due, outlets)
            if recipe.finish is not None and ending != "interrupted":
                recipe.finish(state, self._directory.path)
        except BaseException as error:
            self._failed(status, error)
            raise
        finally:
            outlets.close()
        summary = summarize(
            self._request,
            recipe,
            state,
            ending=ending,
            stop=self._stop,
            metrics=self._metrics,
            since_s=self._zero_s,
        )
        status.update(
            state=summary.state, exit_code=summary.exit_code, ending=ending, step=summary.steps_applied,
            epoch=summary.epoch, metrics=summary.metrics, best=summary.best, seconds=summary.seconds,
        )  # fmt: skip
        return summary

    @contextmanager
    def _nothing_to_save(self) -> Iterator[None]:
        """A signal raises at once inside; one that came before, here."""
        self._stop.at_once = True
        try:
            if self._stop.signum is not None:
                raise Interrupted(self._stop.signum)
            yield
        finally:
            self._stop.at_once = False

    def _phases(self, recipe: Recipe, due: str | None, outlets: Outlets) -> tuple[State, Recipe, Ending]:
        """Fold the recipe, and what follows it; on a resume, from the newest checkpoint on."""
        phase = 0
        while recipe.then is not None and any(self._directory.checkpoints(phase + 1).glob("step-*")):
            recipe = recipe.then(recipe.state)  # only its form counts: the values come from a checkpoint
            phase += 1
        while True:
            state, ending = self._phase(recipe, phase, due, outlets)
            if recipe.then is None or ending == "interrupted":
                return state, recipe, ending
            recipe, due, phase = recipe.then(state), None, phase + 1

    def _phase(self, recipe: Recipe, phase: int, due: str | None, outlets: Outlets) -> tuple[State, Ending]:
        """Fold one recipe."""
        screen, status = self._screen, outlets.status
        outlets.loggers.add((*self._loggers, *recipe.loggers), self._directory.path)
        keeper = CheckpointKeeper(
            self._directory.checkpoints(phase),
            before_save=outlets.flush,
            on_saved=lambda path, best: outlets.say(
                checkpoint=path.name, **({"best_checkpoint": path.name} if best else {})
            ),
        )
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
        state = prepared(recipe, recipe.state)
        loaded = keeper.newest(state, require_exact=self._request.require_exact, note=screen.note)
        if loaded is not None:
            state = loaded
        elif phase:
            keeper.save(state, best=False)  # so that a resume finds this phase begun
        elif self._request.resume:  # it was ended before its first checkpoint: it begins anew
            outlets.keep(lambda _: False)
        mode = recipe.compile if self._request.compile is None else self._request.compile
        loop = Loop(
            compiled(recipe, mode, journal, screen),
            plan=self._request.plan,
            journal=journal,
            keeper=keeper,
            stop=self._stop,
            begun_s=self._zero_s,
            witness=CapsuleWriter(self._directory.path, phase=phase, report=screen.note),
        )
        owed = due is not None and due == digest(state)
        if loaded is not None:
            again = loop.evaluates_first(state, due=owed)
            self._continue_from(state, phase, journal, outlets, again=again)
        try:
            state, ending = loop.run(state, evaluation_due=owed)
            if (
                loop.evaluation_due
            ):  # the state itself does not tell; once it is folded, the digest is another
                status.update(evaluation_due=digest(state))
        finally:
            keeper.close()
            if (close := getattr(recipe.batches, "close", None)) is not None:
                close()  # workers that were kept for the next epoch
        self._metrics = loop.metrics or self._metrics
        return state, ending

    def _continue_from(
        self, state: State, phase: int, journal: RunJournal, outlets: Outlets, *, again: bool
    ) -> None:
        """Drop the lines of what will be done again, the last evaluation perhaps, and say where the run goes on."""
        place = place_of(state)
        attempted = place["attempted"]

        def stands(line: Mapping[str, Any]) -> bool:
            at = line.get("phase", 0), line.get("attempted", 0)
            return at < (phase, attempted) or (
                at == (phase, attempted) and not (again and line["kind"] == "eval")
            )

        outlets.keep(stands)
        journal.event({"event": "resumed", **place})
        where = (
            f"batch {place['batch']} of epoch {place['epoch']}"
            if place["batch"]
            else f"epoch {place['epoch']} is done"
        )
        self._screen.note(f"going on after step {attempted} ({where})")

    def _failed(self, status: Status, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, SteploopError) else 1
        with suppress(SteploopError):  # the error itself matters more
            status.update(state="failed", exit_code=code, error=f"{type(error).__name__}: {error}")
