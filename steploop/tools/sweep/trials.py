"""Run the trials of a search: ask for them, train them, tell how they went; several processes may share them."""

import re
import secrets
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from steploop.errors import ConfigError
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.directory_lock import run_lock, run_owner
from steploop.runs.logs.screens import Screen
from steploop.runs.reading import read_run
from steploop.runs.signals import StopFlag
from steploop.runs.standing import is_run
from steploop.tools.report.results import result_of
from steploop.tools.sweep.conductor import Source
from steploop.tools.sweep.member_ends import read_end
from steploop.tools.sweep.member_run import TAKEN, is_settled, run_member
from steploop.tools.sweep.studies import add_trial, open_study, propose, settings_of
from steploop.tools.sweep.sweep_record import Member, SweepRecord
from steploop.tools.sweep.sweep_writing import write_end

if TYPE_CHECKING:
    import optuna

__all__ = ["PruningLogger", "run_trial", "shared_search"]

_WORKER = re.compile(r"[0-9a-f]{16}")


class PruningLogger:
    """Reports each evaluation to Optuna, and asks the run to stop where Optuna would prune it.

    Args:
        trial: of Optuna.
        key: the name under which loggers get the metric.
        stop: of the run.
        reported: the steps whose evaluations Optuna knows.

    Attributes:
        pruned: whether the run was asked to stop.
    """

    def __init__(self, trial: "optuna.Trial", key: str, stop: StopFlag, reported: Iterable[int]) -> None:
        self._trial = trial
        self._key = key
        self._stop = stop
        self._reported = set(reported)
        self.pruned = False

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Report an evaluation; one that is made again after a resume is reported already."""
        if self._key not in values or self.pruned:
            return
        if step not in self._reported:
            self._reported.add(step)
            self._trial.report(values[self._key], step)
        self._judge()

    def rewrite(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Judge the last evaluation again where a resume goes on behind it: a kill came between verdict and end."""
        steps = [step for step, values in rows if self._key in values]
        if steps and steps[-1] == max(self._reported, default=None):
            self._judge()

    def _judge(self) -> None:
        if self._trial.should_prune() and self._stop.signum is None:
            self.pruned = True
            self._stop.signum = signal.SIGTERM  # the run saves and ends, as after a signal


def run_trial(
    sweep: SweepRecord, number: int, file: RecipeFile, *, screen: Screen, stop: StopFlag, trust: bool
) -> int:
    """Run a trial to its end and tell Optuna its value; returns the exit code, see ``run_member``."""
    import optuna

    with open_study(sweep) as study:
        found = next((t for t in study.trials if t.number == number), None)
        if found is None or sweep.metric is None:
            raise ConfigError(f"The search of {sweep.path} has no trial {number}.")
        member = Member(number, settings_of(sweep.space, found.params))
        # a Trial is what reports and prunes, and Optuna makes it of the number in its database only
        trial = optuna.Trial(study, found._trial_id)
        logger = PruningLogger(trial, f"eval/{sweep.metric[0]}", stop, found.intermediate_values)
        code = run_member(
            sweep, member, file, screen=screen, stop=stop, trust=trust, loggers=[logger]
        )  # fmt: skip
        if code == TAKEN:
            return code
        if logger.pruned:
            stop.signum = None
            if not is_settled(sweep, number):
                write_end(sweep, member, "pruned")
            code = 0
        _tell(study, sweep, number)
        return code


def _tell(study: "optuna.Study", sweep: SweepRecord, number: int) -> None:
    """Tell Optuna how a trial ended; nothing of one that can go on. A kill before it is made up for by a resume."""
    from optuna.trial import TrialState

    where, end = sweep.directory(number), read_end(sweep, number)
    state, value = None, None
    if end is not None:
        state = TrialState.PRUNED if end.state == "pruned" else TrialState.FAIL
    elif is_run(where):
        record = read_run(where)
        if record.state == "finished":
            result = result_of(record)
            value = None if result is None else result.value
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
        elif record.state == "failed":
            state = TrialState.FAIL
    if state is not None:
        study.tell(number, value, state, skip_if_finished=True)


class _Trials:
    """Trials that nobody runs, then new ones, until there are as many as were asked for."""

    def __init__(self, sweep: SweepRecord, study: "optuna.Study", worker: str, *, salt: int) -> None:
        self._sweep = sweep
        self._study = study
        self._worker = worker
        self._salt = salt
        self._tried: set[int] = set()

    def _running(self) -> list["optuna.trial.FrozenTrial"]:
        """The trials that somebody has begun and not ended, by number; not those that this process has tried."""
        from optuna.trial import TrialState

        found = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t for t in found if t.number < self._sweep.trials and t.number not in self._tried]

    def take(self) -> int | None:
        """A trial whose process is gone, else a new one; None if all were taken."""
        for trial in self._running():
            if not self._is_alive(trial):
                self._tried.add(trial.number)
                return trial.number
        trials = self._study.get_trials(deepcopy=False)
        if len(trials) >= self._sweep.trials:
            return None
        params = propose(self._sweep, trials, salt=self._salt)
        number = add_trial(self._sweep, self._study, params, worker=self._worker, nonce=secrets.token_hex(8))
        self._tried.add(number)
        if number >= self._sweep.trials:  # another process was faster
            from optuna.trial import TrialState

            self._study.tell(number, state=TrialState.FAIL)
            return None
        return number

    def _is_alive(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Whether the sweep that asked for a trial is alive, or a process trains it."""
        worker = trial.user_attrs.get("worker")
        places = [self._sweep.directory(trial.number)]
        if isinstance(worker, str) and _WORKER.fullmatch(worker):
            places.append(self._sweep.path / "workers" / worker)
        return any(place.is_dir() and run_owner(place) is not None for place in places)

    def pending(self) -> bool:
        """Whether other processes run trials, which may die."""
        return bool(self._running())

    def ended(self, number: int, code: int) -> None:
        """A trial that another process took may come again."""
        if code == TAKEN:
            self._tried.discard(number)


@contextmanager
def shared_search(sweep: SweepRecord) -> Iterator[Source]:
    """The trials of a search, shared with every other process that sweeps in this directory."""
    workers = sweep.path / "workers"
    workers.mkdir(exist_ok=True)
    others = [place for place in workers.iterdir() if place.is_dir() and run_owner(place) is not None]
    worker = secrets.token_hex(8)
    own = workers / worker
    own.mkdir()
    try:
        # the only one proposes what any other only one would; those who join draw apart
        with run_lock(own), open_study(sweep) as study:
            yield _Trials(sweep, study, worker, salt=int(worker, 16) % (1 << 31) if others else 0)
    finally:
        shutil.rmtree(own, ignore_errors=True)
