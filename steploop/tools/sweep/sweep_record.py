"""sweep.json: what a sweep is, written once. What became of its members is read from their run directories."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from steploop.errors import CheckpointDamagedError, ConfigError, DataError
from steploop.runs.directory_reader import open_file, read_record
from steploop.runs.record_values import is_count, is_number
from steploop.tools.sweep.search_space import Choices, Setting, Span

__all__ = ["FORMAT", "MOST_MEMBERS", "Member", "SweepRecord", "is_sweep", "read_sweep", "sweep_among"]

MOST_MEMBERS = 100_000
FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


@attrs.frozen
class Member:
    """One run of a sweep.

    Attributes:
        number: from 0; names its directory.
        settings: what tells it from the others: the settings that vary, and its seed.
    """

    number: int
    settings: Mapping[str, Any]


@attrs.frozen(kw_only=True)
class SweepRecord:
    """What a sweep is.

    Attributes:
        path: its directory.
        recipe: "path", "name", "sha256" and "modules" of the recipe, as in a run's config.json.
        base: a whole Config as JSON, of which each member changes some settings.
        space: the settings that vary.
        seeds: the seeds of each combination; empty where the seed is a setting like others.
        search: "grid", or "optuna".
        trials: how many runs a search makes.
        search_seed: the seed of the search.
        prune: whether a search stops runs that do worse than others.
        storage: the URL of a search's storage; None: a file in the directory.
        metric: what a search looks at, and "min" or "max".
        options: of each run: device, limit_steps and others.
        threads: of each run; a resume with another number of jobs keeps it, because it decides about bits.
    """

    path: Path
    recipe: Mapping[str, Any]
    base: Mapping[str, Any]
    space: Mapping[str, Setting]
    seeds: tuple[int, ...] = ()
    search: str = "grid"
    trials: int = 0
    search_seed: int = 0
    prune: bool = True
    storage: str | None = None
    metric: tuple[str, str] | None = None
    options: Mapping[str, Any] = attrs.field(factory=dict)
    threads: int = 1

    @property
    def size(self) -> int:
        """How many members there are, or will be."""
        if self.search != "grid":
            return self.trials
        counts = (len(s.values) for s in self.space.values() if isinstance(s, Choices))
        return math.prod(counts) * max(len(self.seeds), 1)

    @property
    def varied(self) -> tuple[str, ...]:
        """The settings that vary, the seed last where each combination has several."""
        return (*self.space, *(["seed"] if self.seeds else []))

    def members(self) -> tuple[Member, ...]:
        """The members of a grid: every combination, the last setting changing fastest. A function of the settings alone."""
        axes = [setting.values for setting in self.space.values() if isinstance(setting, Choices)]
        rows = itertools.product(*axes, *([self.seeds] if self.seeds else []))
        return tuple(Member(n, dict(zip(self.varied, row, strict=True))) for n, row in enumerate(rows))

    def directory(self, number: int) -> Path:
        """The run directory of a member."""
        return self.path / f"{number:03d}"


def is_sweep(path: Path) -> bool:
    """Whether a directory holds a sweep."""
    try:
        with open_file(path, "sweep.json"):
            return True
    except (OSError, DataError):
        return False


def sweep_among(paths: Sequence[Path]) -> SweepRecord | None:
    """The sweep that a command is given; None for runs.

    Raises:
        ConfigError: a sweep is given together with something else.
    """
    found = [path for path in paths if is_sweep(path)]
    if not found:
        return None
    if len(paths) > 1:
        raise ConfigError(f"{found[0]} is a sweep, and is shown alone. Give it alone, or name runs below it.")
    return read_sweep(found[0])


def read_sweep(path: Path) -> SweepRecord:
    """Read a sweep's record. A stranger may have written it: every value is checked by type and size.

    Raises:
        ConfigError: there is no sweep in the directory.
        CheckpointDamagedError: sweep.json is not what a sweep writes.
    """
    try:
        said = read_record(path, "sweep.json")
    except DataError as error:
        raise CheckpointDamagedError(str(error)) from error
    if said is None:
        raise ConfigError(
            f"{path} holds no sweep (there is no sweep.json). Give the directory that steploop sweep wrote."
        )
    if said.get("format") != FORMAT:
        raise CheckpointDamagedError(
            f"{path / 'sweep.json'} has the format {said.get('format')!r}, and this version reads {FORMAT}."
        )
    try:
        return _checked(path, said)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointDamagedError(
            f"{path / 'sweep.json'} is not what a sweep writes: {error}. It was damaged or changed."
        ) from error


def _checked(path: Path, said: Mapping[str, Any]) -> SweepRecord:
    recipe, seeds, metric = said["recipe"], said["seeds"], said["metric"]
    checks = {
        "recipe": isinstance(recipe, dict)
        and all(isinstance(recipe.get(key), str) for key in ("path", "name", "sha256"))
        and _DIGEST.fullmatch(recipe["sha256"]) is not None
        and isinstance(recipe.get("modules"), dict),
        "base": isinstance(said["base"], dict),
        "space": isinstance(said["space"], dict) and said["space"].keys() <= said["base"].keys(),
        "seeds": isinstance(seeds, list) and all(is_count(seed) for seed in seeds),
        "search": said["search"] in {"grid", "optuna"},
        "trials": is_count(said["trials"]) and said["trials"] <= MOST_MEMBERS,
        "search_seed": is_count(said["search_seed"]),
        "prune": isinstance(said["prune"], bool),
        "storage": said["storage"] is None or isinstance(said["storage"], str),
        "metric": metric is None
        or (isinstance(metric, list) and len(metric) == 2 and isinstance(metric[0], str) and metric[1] in {"min", "max"}),
        "options": isinstance(said["options"], dict),
        "threads": is_count(said["threads"]) and said["threads"] > 0,
    }  # fmt: skip
    if wrong := [name for name, right in checks.items() if not right]:
        raise ValueError(f"{wrong[0]} is {str(said[wrong[0]])[:60]!r}")
    sweep = SweepRecord(
        path=path, space={name: _setting(value) for name, value in said["space"].items()}, seeds=tuple(seeds),
        metric=None if metric is None else (metric[0], metric[1]),
        **{key: said[key] for key in checks if key not in {"space", "seeds", "metric"}},
    )  # fmt: skip
    if sweep.search == "grid" and any(isinstance(setting, Span) for setting in sweep.space.values()):
        raise ValueError("a grid has a range")
    if sweep.size > MOST_MEMBERS:
        raise ValueError(f"it has {sweep.size:,} members")
    return sweep


def _setting(value: Any) -> Setting:
    if isinstance(value, list) and value:
        return Choices(tuple(value))
    low, high = value["low"], value["high"]
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(f"the range {str(value)[:60]} is none")
    return Span(low, high, bool(value["log"]), bool(value["whole"]))
