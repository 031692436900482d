"""A run from its beginning to its end: builds the recipe, owns the directory, folds phase after phase, says how it went."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import attrs
import torch

from steploop import __version__
from steploop.capsules import CapsuleWriter
from steploop.errors import SteploopError
from steploop.logs import CsvTable, JsonLines, Logger, Loggers, TensorBoard, read_json_lines
from steploop.logs.screens import Screen
from steploop.overrides import to_json
from steploop.recipe import Recipe, State
from steploop.recipe_files import RecipeFile
from steploop.run.directory import RunDirectory, Status, not_written, read_json, refuse_taken, write_json
from steploop.run.environment import git_commit, versions
from steploop.run.journal import RunJournal
from steploop.run.keeping import CheckpointKeeper
from steploop.run.loop import Loop
from steploop.run.monitoring import prepared
from steploop.run.plan import Ending, Plan
from steploop.run.signals import StopFlag, exit_code_of, signals_as
from steploop.run.states import attempted_steps, lead, members
from steploop.run.tuning import tune_allocator
from steploop.run_lock import run_lock

__all__ = ["Request", "Summary", "carry_out"]


@attrs.frozen(kw_only=True)
class Request:
    """What is to be run, and how.

    Attributes:
        recipe: the recipe file.
        config: its Config.
        directory: where the run's files go.
        device: where to train.
        plan: how it is watched and cut off.
        resume: whether the directory holds the run already, to go on with.
        tensorboard: write TensorBoard event files.
        csv: write metrics.csv.
        mlflow: log to MLflow.
        wandb: log to Weights & Biases.
        tune: set the allocator's thresholds.
        require_exact: refuse to go on where the bits may come out differently.
        command: the words of the command line, for the record.
    """

    recipe: RecipeFile
    config: Any
    directory: RunDirectory
    device: torch.device
    plan: Plan = attrs.field(factory=Plan)
    resume: bool = False
    tensorboard: bool = False
    csv: bool = False
    mlflow: bool = False
    wandb: bool = False
    tune: bool = True
    require_exact: bool = False
    command: Sequence[str] = ()


@attrs.frozen(kw_only=True)
class Summary:
    """How a run ended: the last line on stdout."""

    state: str
    exit_code: int
    run: str
    recipe: str
    data: str
    device: str
    precision: str
    epoch: int
    steps_attempted: int
    steps_applied: int
    steps_skipped: int
    metrics: Mapping[str, float | None]
    best: Mapping[str, Any] | None
    seconds: float


def carry_out(request: Request, screen: Screen, stop: StopFlag | None = None) -> Summary:
    """Run a recipe to its end, or until a signal.

    Args:
        request: what and how.
        screen: where progress is shown; it is closed at the end.
        stop: the flag that signals set.

    Raises:
        RunLockedError: another process trains in this directory.
        RunExistsError: the directory holds something, and this is no resume.
        SteploopError: whatever went wrong; status.json says it too.
        Interrupted: a signal came before there was anything to save.
    """
    stop = stop or StopFlag()
    with signals_as(stop), run_lock(request.directory.path):
        if not request.resume:
            refuse_taken(request.directory)
        try:
            return _Session(request, screen, stop).run()
        finally:
            screen.close()


@attrs.frozen
class _Outlets:
    """Where a run is recorded."""

    lines: JsonLines
    loggers: Loggers
    status: Status


class _Session:
    """The parts of a run while it lasts."""

    def __init__(self, request: Request, screen: Screen, stop: StopFlag) -> None:
        self._request = request
        self._directory = request.directory
        self._screen = screen
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
        due = read_json(self._directory.status).get("evaluation_due") if self._request.resume else None
        try:
            with self._nothing_to_save():
                recipe = self._request.recipe.build(self._request.config, self._request.device)
                self._record(recipe, tuning)
            status = Status(self._directory)
        except BaseException:
            if not self._request.resume:
                self._forget()
            raise
        lines = JsonLines(self._directory.metrics)
        loggers = Loggers(self._loggers(), self._screen.note)
        try:
            state, recipe, ending = self._phases(recipe, due, _Outlets(lines, loggers, status))
            if recipe.finish is not None and ending != "interrupted":
                recipe.finish(state, self._directory.path)
        except BaseException as error:
            self._failed(status, error)
            raise
        finally:
            loggers.close()
            lines.close()
        return self._ended(state, recipe, ending, status)

    @contextmanager
    def _nothing_to_save(self) -> Iterator[None]:
        """A signal raises at once inside."""
        self._stop.at_once = True
        try:
            yield
        finally:
            self._stop.at_once = False

    def _phases(self, recipe: Recipe, due: int | None, outlets: "_Outlets") -> tuple[State, Recipe, Ending]:
        """Fold the recipe, and what follows it; on a resume, from the newest checkpoint on."""
        phase = 0
        while self._directory.checkpoints(phase + 1).is_dir() and recipe.then is not None:
            recipe = recipe.then(recipe.state)  # only its form counts: the values come from a checkpoint
            phase += 1
        while True:
            state, ending = self._phase(recipe, phase, due, outlets)
            if recipe.then is None or ending == "interrupted":
                return state, recipe, ending
            recipe, due, phase = recipe.then(state), None, phase + 1

    def _phase(
        self, recipe: Recipe, phase: int, due: int | None, outlets: "_Outlets"
    ) -> tuple[State, Ending]:
        """Fold one recipe."""
        screen, status = self._screen, outlets.status
        keeper = CheckpointKeeper(
            self._directory.checkpoints(phase),
            on_saved=lambda path, best: status.update(
                checkpoint=path.name, **({"best_checkpoint": path.name} if best else {})
            ),
        )
        journal = RunJournal(
            outlets.lines,
            outlets.loggers,
            screen,
            steps_per_epoch=len(recipe.batches),
            epochs=recipe.epochs,
            phase=phase,
            on_evaluation=lambda line: status.update(
                step=line["step"], epoch=line["epoch"], metrics=_json_metrics(line["metrics"])
            ),
        )
        state = prepared(recipe, recipe.state)
        loaded = keeper.newest(state, require_exact=self._request.require_exact, note=screen.note)
        if loaded is not None:
            state = loaded
            self._continue_from(state, phase, journal, outlets.lines)
        elif phase:
            keeper.save(state, best=False)  # so that a resume finds this phase begun
        loop = Loop(
            recipe,
            plan=self._request.plan,
            journal=journal,
            keeper=keeper,
            stop=self._stop,
            begun_s=self._zero_s,
            witness=CapsuleWriter(self._directory.path, phase=phase, report=screen.note),
        )
        try:
            state, ending = loop.run(state, evaluation_due=due is not None and due == attempted_steps(state))
        finally:
            keeper.close()
        if loop.evaluation_due is not None:
            status.update(evaluation_due=loop.evaluation_due)
        self._metrics = loop.metrics or self._metrics
        return state, ending

    def _continue_from(self, state: State, phase: int, journal: RunJournal, lines: JsonLines) -> None:
        """Drop the lines of steps that will be taken again, and say where the run goes on."""
        first, attempted = lead(state), attempted_steps(state)
        lines.keep(lambda line: (line.get("phase", 0), line.get("attempted", 0)) <= (phase, attempted))
        place = {"step": first.step, "attempted": attempted, "epoch": first.epoch, "batch": first.batch}
        journal.event({"event": "resumed", **place})
        self._screen.note(f"going on at step {attempted}: epoch {first.epoch + 1}, batch {first.batch}")

    def _loggers(self) -> list[Logger]:
        loggers: list[Logger] = []
        if self._request.tensorboard:
            loggers.append(TensorBoard(self._directory.path / "tensorboard"))
        if self._request.mlflow:
            from steploop.logs.mlflow_logger import MLflow

            loggers.append(MLflow(self._directory.path, to_json(self._request.config)))
        if self._request.wandb:
            from steploop.logs.wandb_logger import WandB

            loggers.append(WandB(self._directory.path, to_json(self._request.config)))
        if self._request.csv:
            loggers.append(CsvTable(self._directory.path / "metrics.csv"))
        return loggers

    def _record(self, recipe: Recipe, tuning: Mapping[str, int]) -> None:
        """Write config.json and the copy of the recipe; on a resume, compare."""
        request = self._request
        if not request.resume:
            try:
                self._directory.recipe.write_bytes(request.recipe.source)
            except OSError as error:
                raise not_written(self._directory.recipe, error) from error
        first = lead(recipe.state)
        path = request.recipe.path.resolve()
        write_json(self._directory.config, {
            "steploop": __version__,
            "recipe": {"path": str(path), "name": request.recipe.name, "sha256": request.recipe.sha256},
            "config": to_json(request.config),
            "device": str(request.device),
            "precision": first.precision,
            "data": recipe.data,
            "versions": versions(),
            "git_commit": git_commit(path.parent),
            "command": list(request.command or sys.argv),
            "tuning": dict(tuning),
        })  # fmt: skip
        count = sum(p.numel() for one in members(recipe.state).values() for p in one.params.values())
        self._screen.note(
            f"{request.recipe.name}: {count:,} parameters, {first.precision} on {request.device}, {self._directory.path}"
        )
        for note in (f"data: {recipe.data}" if recipe.data else "", *recipe.notes):
            if note:
                self._screen.note(note)

    def _forget(self) -> None:
        """Leave no directory behind for a run that never began."""
        for path in (self._directory.config, self._directory.recipe, self._directory.status):
            path.unlink(missing_ok=True)

    def _failed(self, status: Status, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, SteploopError) else 1
        with suppress(SteploopError):  # the error itself matters more
            status.update(state="failed", exit_code=code, error=f"{type(error).__name__}: {error}")

    def _ended(self, state: State, recipe: Recipe, ending: Ending, status: Status) -> Summary:
        first = lead(state)
        code = (
            exit_code_of(self._stop.signum)
            if ending == "interrupted" and self._stop.signum is not None
            else 0
        )
        best = None if first.best is None else {"metric": recipe.monitor, **attrs.asdict(first.best)}
        summary = Summary(
            state="interrupted" if ending == "interrupted" else "finished",
            exit_code=code,
            run=str(self._directory.path),
            recipe=self._request.recipe.name,
            data=recipe.data,
            device=str(self._request.device),
            precision=first.precision,
            epoch=first.epoch,
            steps_attempted=attempted_steps(state),
            steps_applied=first.step,
            steps_skipped=first.attempted_steps - first.step,
            metrics=_json_metrics(self._metrics),
            best=best,
            seconds=round(time.perf_counter() - self._zero_s, 3),
        )
        status.update(
            state=summary.state, exit_code=code, ending=ending, step=summary.steps_applied, epoch=summary.epoch,
            metrics=summary.metrics, best=best, seconds=summary.seconds,
        )  # fmt: skip
        return summary


def _json_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what JSON cannot hold."""
    return {
        name: value if value is not None and abs(value) < float("inf") else None
        for name, value in metrics.items()
    }
