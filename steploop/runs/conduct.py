"""Carry out a run: build its recipe, lock its directory, train, and say how it ended."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from steploop.core.interruption import Interrupted
from steploop.core.state.several import members
from steploop.errors import CheckpointWriteError, RankFailedError, SteploopError
from steploop.recipe.recipe import Logger
from steploop.runs.allocator import tune_allocator
from steploop.runs.beginning import Beginning, begin_anew
from steploop.runs.directory import Status, clear_unfinished, forget, forget_failed, read_status, refuse_taken
from steploop.runs.directory_lock import run_lock
from steploop.runs.logs.screens import Screen
from steploop.runs.outlets import open_outlets, open_services
from steploop.runs.past import Past, read_past
from steploop.runs.phases import Phases
from steploop.runs.ranks.team import Team
from steploop.runs.record_values import is_duration
from steploop.runs.requests import Request
from steploop.runs.resumption import begin_again
from steploop.runs.signals import StopFlag, signals_as
from steploop.runs.standard_streams import lasting_streams
from steploop.runs.start_record import announce, record
from steploop.runs.summary import Summary, summarize

__all__ = ["carry_out"]


def carry_out(
    request: Request,
    screen: Screen,
    stop: StopFlag | None = None,
    loggers: Sequence[Logger] = (),
    team: Team | None = None,
) -> Summary:
    """Run a recipe to its end, or until a signal.

    Args:
        request: what and how.
        screen: where progress is shown; it is closed at the end.
        stop: the flag that signals set.
        loggers: in addition to those of the recipe.
        team: the ranks that train together. Rank 0 alone locks and writes the directory.

    Raises:
        RunLockedError: another process trains in this directory.
        RunExistsError: the directory holds something, and this is no resume.
        SteploopError: the run failed; status.json says it too.
        Interrupted: a signal came before there was anything to save.
    """
    team = team or Team()
    stop = team.stop_flag(stop or StopFlag())
    stop.at_once = False  # the directory is there: what comes now is seen where it can be taken away again
    try:
        with lasting_streams(), signals_as(stop), _owned(request, team):
            team.wait_for_all()  # nothing is read of a directory that is not ours
            try:
                return _Run(request, screen, stop, loggers, team).run()
            finally:
                screen.close()
    except CheckpointWriteError:
        if team.first:
            forget(request.directory, keep_if_begun=True)  # not even the lock could be written
        raise


@contextmanager
def _owned(request: Request, team: Team) -> Iterator[None]:
    """Hold the directory of a run, on the rank that owns it."""
    if not team.first:
        yield
        return
    with run_lock(request.directory.path):
        if not request.resume:
            refuse_taken(request.directory)
        clear_unfinished(request.directory)
        yield


# what a resume takes over from the status before, until it knows better
_KEPT = ("step", "epoch", "metrics", "best", "checkpoint", "best_checkpoint", "evaluation_due", "seconds")


class _Run:
    """The parts of a run while it lasts."""

    def __init__(
        self, request: Request, screen: Screen, stop: StopFlag, loggers: Sequence[Logger], team: Team
    ) -> None:
        self._team = team
        self._request = request
        self._directory = request.directory
        self._screen = screen
        self._loggers = loggers
        self._stop = stop
        self._before = read_status(self._directory) if request.resume else {}
        self._past = read_past(self._directory, self._before) if request.resume else Past()
        self._zero_s = time.perf_counter() - self._past.seconds

    def run(self) -> Summary:
        """Build, train, say how it went."""
        tuning = tune_allocator() if self._request.tune else {}
        try:
            with self._nothing_to_save():
                beginning = self._begin()
                self._compare(beginning)  # and all have read what is written from here on
                services = open_services(self._request) if self._team.first else []
                if self._team.first and not beginning.ended:
                    record(self._request, beginning, tuning)
                announce(self._request, beginning.recipe, self._screen)
            kept = {key: self._before[key] for key in _KEPT if key in self._before}
            written = self._directory if self._team.first else None
            status = Status(written, monitor=beginning.recipe.monitor, **kept)
            outlets = open_outlets(
                self._request, status, self._screen.note, services, writes=self._team.first
            )
        except BaseException as error:
            ours = self._team.failed(error)
            if self._team.first and not self._request.resume:
                forget(self._directory)
            if ours is error:
                raise
            raise ours from error
        try:
            phases = Phases(
                self._request, outlets, self._screen, self._stop, self._loggers, zero_s=self._zero_s,
                past=self._past, team=self._team,
            )  # fmt: skip
            folded = phases.fold(beginning)
            if self._team.first and folded.recipe.finish is not None and folded.ending != "interrupted":
                folded.recipe.finish(folded.state, self._directory.path)
            self._team.wait_for_all()
        except BaseException as error:
            ours = self._team.failed(error)
            self._failed(status, ours)
            outlets.close()
            if self._team.first and not self._request.resume:
                forget_failed(self._directory)
            if ours is error:
                raise
            raise ours from error
        outlets.close()
        idle = folded.idle and is_duration(self._before.get("seconds"))
        summary = summarize(
            self._request,
            folded.recipe,
            folded.state,
            ending=folded.ending,
            stop=self._stop,
            metrics=folded.metrics or self._past.metrics,
            seconds=self._before["seconds"] if idle else time.perf_counter() - self._zero_s,
        )
        status.update(
            state=summary.state, exit_code=summary.exit_code, ending=folded.ending, step=summary.steps_applied,
            epoch=summary.epoch, metrics=summary.metrics, best=summary.best, seconds=summary.seconds,
        )  # fmt: skip
        return summary

    def _begin(self) -> Beginning:
        """What the run begins with; nothing in its directory is changed yet."""
        if self._request.resume:
            return begin_again(self._request, self._before, self._screen.note)
        return begin_anew(self._request, self._screen.note)

    def _compare(self, beginning: Beginning) -> None:
        """Refuse ranks that were given, or have built, different things."""
        request = self._request
        self._team.require_same(
            recipe=[request.recipe.sha256, dict(request.modules)],
            settings=request.settings,
            checkpoint=[(n, one.step, one.epoch, one.batch) for n, one in members(beginning.recipe.state).items()],
            **{f"{name}_of_the_recipe": value for name, value in beginning.record.items()},
        )  # fmt: skip

    @contextmanager
    def _nothing_to_save(self) -> Iterator[None]:
        """A signal raises at once inside; one that came before, here. An error after it may come of its being swallowed."""
        self._stop.at_once = True
        try:
            if self._stop.heard is not None:
                raise Interrupted(self._stop.heard)  # noqa: TRY301  (at_once is set, and has to be taken back)
            yield
        except Exception as error:
            if self._stop.heard is None or isinstance(error, RankFailedError):
                raise
            raise Interrupted(self._stop.heard) from error
        finally:
            self._stop.at_once = False

    def _failed(self, status: Status, error: BaseException) -> None:
        code = error.exit_code if isinstance(error, SteploopError) else 1
        with suppress(SteploopError):  # the error itself matters more
            status.update(state="failed", exit_code=code, error=f"{type(error).__name__}: {error}")
