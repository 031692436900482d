"""Plan a sweep: everything that can be refused is refused here, before a member is started."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from steploop.errors import ConfigError, RunExistsError
from steploop.recipe.config_values import configure, fields_of, refuse_unrecordable, settled_paths, to_json
from steploop.recipe.imported_modules import imported_modules
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.directory import make_directory, write_durably
from steploop.runs.environment import find_device
from steploop.tools.sweep.search_space import Choices, Setting, Span, read_seeds, read_space
from steploop.tools.sweep.sweep_record import MOST_MEMBERS, SweepRecord, is_sweep
from steploop.tools.sweep.sweep_writing import write_sweep

__all__ = ["begin_sweep", "more_trials", "threads_for"]


def threads_for(jobs: int) -> int:
    """Threads of each of so many processes: OMP_NUM_THREADS where it is set, else its share of the cores.

    Raises:
        ConfigError: ``jobs`` is not 1 or more.
    """
    if type(jobs) is not int or jobs < 1:
        raise ConfigError(f"jobs must be a whole number from 1 on, but is {jobs!r}.")
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, cores // jobs)


def begin_sweep(
    file: RecipeFile,
    given: Mapping[str, Any],
    *,
    seeds: Any,
    search: str,
    trials: int | None,
    out: Path | None,
    options: Mapping[str, Any],
    resolve_device: bool,
    **others: Any,
) -> SweepRecord:
    """Make the directory of a sweep and write what it is.

    Args:
        file: the recipe.
        given: setting -> what is tried; see ``read_space``.
        seeds: see ``read_seeds``.
        search: "grid", or "optuna".
        trials: how many runs a search makes.
        out: the directory; None: the next ``runs/<recipe>-sweep-<n>``.
        options: of each run.
        resolve_device: whether "auto" is this machine's device; members on other machines look for theirs.
        others: fields of SweepRecord.

    Raises:
        ConfigError: a setting, a seed, an option or their combination does not fit.
        RunExistsError: ``out`` is not empty.
        CheckpointWriteError: the directory cannot be written.
    """
    where = file.name
    space = read_space(file.config_class, given, where=where)
    numbers = read_seeds(seeds)
    _refuse_mismatch(file, space, numbers, search, trials)
    constants = {n: s.values[0] for n, s in space.items() if isinstance(s, Choices) and len(s.values) == 1}
    config = configure(file.config_class, constants, where=where)
    base = to_json(settled_paths(config, fields_of(file.config_class)))
    space = {name: _settled(file, name, s) for name, s in space.items() if name not in constants}
    if search == "optuna":
        from steploop.tools.sweep.studies import metric_of

        others["metric"] = metric_of(file, given)
    device = options.get("device") or "auto"
    if resolve_device or device != "auto":
        find = find_device(device)
        device = str(find) if resolve_device else device
    sweep = SweepRecord(
        path=Path(),
        recipe={
            "path": str(file.path.resolve()), "name": file.name, "sha256": file.sha256,
            "modules": imported_modules(file.source, file.path.resolve().parent),
        },
        base=base, space=space, seeds=numbers, search=search, trials=trials or 0,
        options={**options, "device": device}, **others,
    )  # fmt: skip
    if sweep.size > MOST_MEMBERS:
        raise ConfigError(
            f"The sweep has {sweep.size:,} members, and at most {MOST_MEMBERS:,} are run. Try fewer values."
        )
    for member in sweep.members() if search == "grid" else ():
        config = configure(file.config_class, {**base, **member.settings}, where=where)
        refuse_unrecordable(config, where=where)
    if out is not None and is_sweep(out):
        raise RunExistsError(
            f"{out} holds a sweep already. Go on with it by steploop sweep --resume {out}, or choose another --out."
        )
    directory = make_directory(out, f"{file.name}-sweep")
    sweep = attrs.evolve(sweep, path=directory.given)
    write_sweep(sweep)
    write_durably(directory.recipe, file.source)
    return sweep


def _refuse_mismatch(
    file: RecipeFile, space: Mapping[str, Setting], seeds: tuple[int, ...], search: str, trials: int | None
) -> None:
    """Refuse settings, seeds and search that do not go together."""
    fields = fields_of(file.config_class)
    spans = [name for name, setting in space.items() if isinstance(setting, Span)]
    if search not in {"grid", "optuna"}:
        raise ConfigError(f'search must be "grid" or "optuna", but is {search!r}.')
    if seeds and "seed" not in fields:
        raise ConfigError(
            f"{file.name} has no setting seed, so that --seeds changes nothing. There are: {', '.join(fields)}."
        )
    if seeds and "seed" in space:
        raise ConfigError("--seeds and --set seed are both given. Give one of them.")
    if search == "grid":
        if spans:
            raise ConfigError(
                f"{spans[0]}={space[spans[0]]} is a range, and a grid needs values, as in {spans[0]}=0.01,0.1. A search draws "
                "from ranges: --search optuna --trials N."
            )
        if trials is not None:
            raise ConfigError(
                "--trials is about a search, and a grid runs each combination once. Give --search optuna too."
            )
        return
    if seeds:
        raise ConfigError(
            "--seeds is about a grid. A search runs each trial once: give one seed with --set seed=N."
        )
    if type(trials) is not int or trials < 1:
        raise ConfigError(f"A search needs --trials N, how many runs to make, but got {trials!r}.")
    if not any(isinstance(s, Span) or len(s.values) > 1 for s in space.values()):
        raise ConfigError("A search needs something to look for: --set NAME=LOW..HIGH, or NAME=A,B,C.")


def _settled(file: RecipeFile, name: str, setting: Setting) -> Setting:
    """The alternatives with their relative paths made absolute: a resume from elsewhere means the same."""
    if isinstance(setting, Span):
        return setting
    configs = (configure(file.config_class, {name: value}) for value in setting.values)
    return Choices(tuple(to_json(settled_paths(config, [name]))[name] for config in configs))


def more_trials(sweep: SweepRecord, trials: int | None) -> SweepRecord:
    """The sweep with another number of trials, which is recorded.

    Raises:
        ConfigError: it is a grid, or the number is smaller than before.
    """
    if trials is None or trials == sweep.trials:
        return sweep
    if sweep.search == "grid":
        raise ConfigError("--trials is about a search, and this sweep is a grid. Leave it out.")
    if not sweep.trials <= trials <= MOST_MEMBERS:
        raise ConfigError(
            f"--trials {trials}: the sweep has {sweep.trials} already, and at most {MOST_MEMBERS:,} are run."
        )
    sweep = attrs.evolve(sweep, trials=trials)
    write_sweep(sweep)
    return sweep
