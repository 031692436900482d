"""Begin a sweep or go on with one, and run what is left of it."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

from steploop.core.interruption import Interrupted
from steploop.errors import ConfigError
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.directory import write_durably
from steploop.runs.directory_lock import run_lock
from steploop.runs.logs.screens import QuietScreen
from steploop.runs.signals import StopFlag, signals_as
from steploop.runs.standing import is_run
from steploop.runs.trust import require_trust
from steploop.tools.sweep.any_member import run_any_member
from steploop.tools.sweep.conductor import Grid, Source, conduct
from steploop.tools.sweep.member_launchers import Inside, Launcher, Processes
from steploop.tools.sweep.member_run import recorded_recipe, refuse_changed_code
from steploop.tools.sweep.sweep_plan import begin_sweep, more_trials, threads_for
from steploop.tools.sweep.sweep_record import SweepRecord, read_sweep
from steploop.tools.sweep.sweep_result import SweepResult, read_result
from steploop.tools.sweep.sweep_screens import choose_sweep_screen
from steploop.tools.sweep.vectorise_record import begin_vectorising, read_vectorised, refuse_with

__all__ = ["launch_sweep"]


def launch_sweep(
    file: RecipeFile | None,
    given: Mapping[str, Any],
    *,
    inside: bool,
    seeds: Any,
    jobs: int,
    out: Path | None,
    resume: Path | None,
    search: str,
    trials: int | None,
    prune: bool,
    search_seed: int,
    storage: str | None,
    cluster: str | None,
    cluster_options: Mapping[str, Any],
    progress: str,
    stream: TextIO,
    trust: bool,
    stop: StopFlag,
    options: Mapping[str, Any],
    vectorise: str | None = None,
) -> SweepResult:
    """Begin a sweep or go on with one: what the command line and ``steploop.sweep`` share.

    Args:
        file: the recipe; None: that of the sweep to go on with.
        given: setting -> what is tried.
        inside: whether the members run in this process, because the recipe is in no file.
        seeds: see ``read_seeds``.
        jobs: how many members run at once.
        out: directory for a new sweep, or None.
        resume: directory of a sweep to go on with, or None.
        search: "grid" or "optuna".
        trials: how many runs a search makes.
        prune: whether a search stops bad runs.
        search_seed: the seed of the search.
        storage: URL of the search's storage, or None.
        cluster: "slurm" or "local"; None: processes of this machine.
        cluster_options: parameters of submitit.
        progress: "auto", "plain" or "none".
        stream: where progress is shown.
        trust: go on with a sweep whose files belong to another user.
        stop: the flag that signals set.
        options: of each run.
        vectorise: "auto", "on" or "off"; None: off, or as a sweep was begun.

    Raises:
        SteploopError: see ``sweep``.
    """
    refuse_with(vectorise or "off", search=search, cluster=cluster)
    _refuse_several(inside=inside, jobs=jobs, cluster=cluster)
    threads = threads_for(jobs)
    if resume is None:
        if file is None:
            raise ConfigError(
                "Which recipe? Give a file or a name, as in steploop sweep mnist, or --resume DIR."
            )
        _refuse_options(search, storage=storage, prune=prune, search_seed=search_seed)
        if vectorise == "auto":  # a member on its own takes the faster step too
            options = {"compile": "auto", **options}
        record = begin_sweep(
            file, given, seeds=seeds, search=search, trials=trials, out=out, options=options,
            resolve_device=cluster is None, prune=prune, search_seed=search_seed, storage=storage, threads=threads,
        )  # fmt: skip
        begin_vectorising(record, vectorise or "off")
    else:
        fixed = {
            "--set": given, "--seeds": seeds is not None, "--out": out, "--search": search != "grid", "--storage": storage,
            "--no-prune": not prune, "--search-seed": search_seed, "--vectorise": vectorise is not None, **{f"--{k.replace('_', '-')}": v for k, v in options.items()},
        }  # fmt: skip
        if wrong := [name for name, value in fixed.items() if value not in (None, False, 0, {}, "auto")]:
            raise ConfigError(
                f"{wrong[0]} and --resume are both given. A resumed sweep goes on with what it was begun with: leave {wrong[0]} out."
            )
        if file is not None and not inside:
            raise ConfigError(
                "A recipe and --resume are both given. A resumed sweep has its recipe: leave RECIPE out."
            )
        require_trust(resume, trust=trust, command="sweep --resume")
        record = more_trials(read_sweep(resume), trials)
        if file is None:
            file = recorded_recipe(record)
        else:
            refuse_changed_code(record, file)
        if not (record.path / "recipe.py").exists():
            write_durably(record.path / "recipe.py", file.source)
    try:
        return _carry_out(
            record, file, inside=inside, jobs=jobs, cluster=cluster, cluster_options=cluster_options, trust=trust, stop=stop,
            progress=progress, stream=stream,
        )  # fmt: skip
    except ConfigError:
        if vectorise == "on" and not any(is_run(record.directory(m.number)) for m in record.members()):
            shutil.rmtree(record.path, ignore_errors=True)  # it was refused, and nothing was run
        raise


def _refuse_several(*, inside: bool, jobs: int, cluster: str | None) -> None:
    if inside and (jobs != 1 or cluster is not None):
        raise ConfigError(
            "A function is known to this process alone, which runs one member at a time. Put the recipe into a file for "
            "several jobs or a cluster, or leave them out."
        )


def _refuse_options(search: str, *, storage: str | None, prune: bool, search_seed: int) -> None:
    if search == "grid" and (storage is not None or not prune or search_seed):
        raise ConfigError(
            "--storage, --no-prune and --search-seed are about a search. Give --search optuna too."
        )


def _carry_out(
    record: SweepRecord,
    file: RecipeFile,
    *,
    inside: bool,
    jobs: int,
    cluster: str | None,
    cluster_options: Mapping[str, Any],
    progress: str,
    stream: TextIO,
    trust: bool,
    stop: StopFlag,
) -> SweepResult:
    """Run what is left of a sweep."""
    screen = choose_sweep_screen(record, progress=progress, stream=stream)
    launcher = _launcher(
        record, file, inside=inside, cluster=cluster, options=cluster_options, trust=trust, stop=stop
    )
    stop.at_once = False
    if stop.signum is not None:
        raise Interrupted(stop.signum)
    screen.note(
        f"sweep of {record.recipe['name']}: {record.size} runs, {jobs} at a time with {record.threads} threads each, {record.path}"
    )
    with signals_as(stop), _owned(record) as source:
        rest = source
        try:
            if read_vectorised(record) is not None:
                refuse_with("on", search=record.search, cluster=cluster)
                # slow to import, and seldom wanted
                from steploop.tools.sweep.vectorising import Vectorising

                populations = Vectorising(record, file, jobs=jobs, screen=screen, stop=stop, trust=trust)
                rest = Grid(record, leave_out=populations.run())
            conduct(rest, launcher, jobs=jobs, watcher=screen, stop=stop)
        finally:
            screen.close()
    return read_result(record, interrupted=stop.signum)


@contextmanager
def _owned_grid(record: SweepRecord) -> Iterator[Source]:
    with run_lock(record.path):
        yield Grid(record)


def _owned(record: SweepRecord) -> AbstractContextManager[Source]:
    """A grid belongs to one process; a search is shared by all that know its storage."""
    if record.search == "grid":
        return _owned_grid(record)
    from steploop.tools.sweep.trials import shared_search

    return shared_search(record)


def _launcher(
    record: SweepRecord,
    file: RecipeFile,
    *,
    inside: bool,
    cluster: str | None,
    options: Mapping[str, Any],
    trust: bool,
    stop: StopFlag,
) -> Launcher:
    if options and cluster is None:
        raise ConfigError("--cluster-set is about a cluster. Give --cluster slurm too.")
    if cluster is not None:
        from steploop.tools.sweep.cluster_jobs import ClusterJobs

        return ClusterJobs(record.path, cluster=cluster, options=options, threads=record.threads, trust=trust)
    if not inside:
        return Processes(record.path, threads=record.threads, trust=trust)

    def run(number: int) -> int:
        own = StopFlag(second_raises=True)
        code = run_any_member(record, number, file, screen=QuietScreen(), stop=own, trust=trust)
        stop.signum = stop.signum if stop.signum is not None else own.signum
        return code

    return Inside(run)
