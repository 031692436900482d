"""The run directory: made for one run, refused to a second one, and what it says about itself in JSON files."""

import errno
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from steploop.checkpoint.storage.litter import sweep
from steploop.checkpoint.storage.local import LOCAL
from steploop.core.atomic_files import replace_file
from steploop.errors import (
    CheckpointDamagedError,
    CheckpointWriteError,
    ConfigError,
    DataError,
    RunExistsError,
)
from steploop.runs.directory_reader import phase_folders, read_record, refuse_irregular
from steploop.runs.record_values import checked_status, unresumable
from steploop.runs.text_names import readable

__all__ = [
    "RunDirectory",
    "Status",
    "clear_unfinished",
    "forget",
    "forget_failed",
    "json_bytes",
    "make_directory",
    "not_written",
    "open_directory",
    "read_json",
    "read_status",
    "refuse_taken",
    "write_durably",
    "write_json",
]

# what a run reads or appends to when it goes on
_FILES = ("config.json", "recipe.py", "status.json", "metrics.jsonl", "metrics.csv", "run.owner.json")
_OF_A_START = ("recipe.py", "status.json", "metrics.jsonl", "loggers.json")
_OF_THE_LOCK = {"run.lock", "run.owner.json"}
# written beside a file of that name, to take its place: a kill in between leaves them
_BESIDE = re.compile(
    r"\.(config\.json|loggers\.json|recipe\.py|status\.json|metrics\.(jsonl|csv)|run\.owner\.json)-\d+"
)


def _absolute(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(path.absolute() for path in paths)


@attrs.frozen
class RunDirectory:
    """The names in a run directory.

    Attributes:
        given: the directory as the user named it, for messages.
        made: the directories that were made for this run, outermost first; they go if it never begins.
        numbered: whether the run got the next number in ``runs/``, rather than a name.
        path: the directory, absolute: a recipe may go to another one.
    """

    given: Path
    made: tuple[Path, ...] = attrs.field(default=(), converter=_absolute)
    numbered: bool = False
    path: Path = attrs.field(init=False)

    @path.default
    def _path(self) -> Path:
        return self.given.absolute()

    @property
    def config(self) -> Path:
        """What was run: recipe, Config, versions, device."""
        return self.path / "config.json"

    @property
    def recipe(self) -> Path:
        """A copy of the recipe file."""
        return self.path / "recipe.py"

    @property
    def status(self) -> Path:
        """How far the run is, and how it ended."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """A line for each log point, evaluation and event."""
        return self.path / "metrics.jsonl"

    def checkpoints(self, phase: int = 0) -> Path:
        """The checkpoints of a phase; the second phase of a recipe is number 1."""
        return self.path / ("checkpoints" if phase == 0 else f"checkpoints-phase-{phase + 1}")


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """The content of a JSON file of a run."""
    return readable(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)).encode() + b"\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one.

    Raises:
        CheckpointWriteError: it cannot be written.
    """
    _replace(path, json_bytes(value), durable=False)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is written once and needed for every resume: it is on the disk when this returns.

    Raises:
        CheckpointWriteError: it cannot be written.
    """
    _replace(path, data, durable=True)


def _replace(path: Path, data: bytes, *, durable: bool) -> None:
    try:
        replace_file(path, data, durable=durable)
        if durable:
            LOCAL.sync_directory(path.parent)
    except OSError as error:
        raise not_written(path, error) from error


def read_status(directory: RunDirectory) -> dict[str, Any]:
    """What a run last said of itself; nothing where a kill or a power loss left no such file, or half of one.

    No step depends on it, so it keeps nobody from going on.
    """
    try:
        said = read_json(directory.status)
    except CheckpointDamagedError:
        return {}
    problems: list[str] = []
    checked_status(said, problems)
    return {} if problems else said


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run.

    Raises:
        CheckpointDamagedError: it is missing or no JSON object.
    """
    try:
        value = read_record(path.parent, path.name)
    except DataError as error:
        raise CheckpointDamagedError(f"{error} Give --out for a new run.") from error
    if value is None:
        raise CheckpointDamagedError(f"{path} is missing. Give --out for a new run.")
    return value


def not_written(path: Path, error: OSError) -> CheckpointWriteError:
    """The error for a file or directory of a run that cannot be written."""
    raised = CheckpointWriteError(
        f"{path} cannot be written: {error.strerror or error}. Choose another directory with --out."
    )
    raised.errno = error.errno
    return raised


def make_directory(out: Path | None, name: str) -> RunDirectory:
    """A new directory for a run: ``out``, or the first ``runs/<name>-<n>`` that nobody has.

    Raises:
        RunExistsError: ``out`` holds something already.
        CheckpointWriteError: it cannot be made.
    """
    try:
        if out is not None:
            made = _make(out)
            # else its owner, if it has one, is what the user wants to hear of
            if not (out / "run.lock").exists():
                refuse_taken(RunDirectory(out))
            return RunDirectory(out, made)
        runs = Path("runs")
        made = _make(runs)
        numbers = [
            int(p.name.rpartition("-")[2])
            for p in runs.glob(f"{name}-*")
            if p.name.rpartition("-")[2].isdecimal()
        ]
        number = max(numbers, default=0) + 1
        while True:
            with suppress(FileExistsError):  # another run took it in between
                (own := runs / f"{name}-{number}").mkdir()
                return RunDirectory(own, (*made, own), numbered=True)
            number += 1
    except RunExistsError:
        raise
    except OSError as error:
        raise not_written(out or Path("runs"), error) from error


def _make(path: Path) -> tuple[Path, ...]:
    """Make a directory and its parents; return those that were missing, outermost first."""
    made: list[Path] = []
    for one in (*reversed(path.parents), path):
        with suppress(FileExistsError):
            one.mkdir()
            made.append(one)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    return tuple(made)


def forget(directory: RunDirectory, *, keep_if_begun: bool = False) -> None:
    """Take away what was made for a run that never began; never raises.

    Args:
        directory: of the run.
        keep_if_begun: do nothing if the run has recorded what it is.
    """
    if keep_if_begun and directory.config.exists():
        return
    if directory.path in directory.made:
        shutil.rmtree(directory.path, ignore_errors=True)
        for path in reversed(directory.made):
            with suppress(OSError):
                path.rmdir()
        return
    for path in (*(directory.path / name for name in _OF_A_START), directory.config):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def forget_failed(directory: RunDirectory) -> None:
    """Remove a run that failed before it had anything to keep, so that the next one gets its number; never raises.

    A directory that was named (``--out``) stays: whoever named it may ask for its status.
    """
    kept = (*directory.path.glob("checkpoints*/*"), *directory.path.glob("capsules/*"))
    logged = directory.metrics.stat().st_size if directory.metrics.exists() else 0
    if directory.numbered and not kept and not logged:
        forget(directory)


def refuse_taken(directory: RunDirectory) -> None:
    """Raise RunExistsError if a directory holds anything but a lock, and what a killed start left that never was a run."""
    names = {path.name for path in directory.path.iterdir() if not _BESIDE.fullmatch(path.name)}
    names -= _OF_THE_LOCK
    if names:
        what = "a run" if directory.config.name in names else f"{min(names)!r} and is not empty"
        hint = (
            f"Go on with it by steploop resume {directory.given}, or choose" if what == "a run" else "Choose"
        )
        raise RunExistsError(f"{directory.given} holds {what} already. {hint} another --out.")


def clear_unfinished(directory: RunDirectory) -> None:
    """Remove what kills have left half written; with the run locked, nobody else is writing.

    A checkpoint that was set aside for a newer one of its step, which did not arrive, has its name again before anybody
    looks for it.
    """
    for path in directory.path.iterdir():
        if _BESIDE.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()
    for folder in (directory.path / "capsules", *phase_folders(directory.path)):
        with suppress(OSError):
            sweep(LOCAL, folder)


def open_directory(path: Path) -> RunDirectory:
    """The directory of a run that exists.

    Raises:
        ConfigError: there is no run in it.
        CheckpointDamagedError: its ``config.json`` is damaged, or a link or a pipe stands in the place of a file.
    """
    directory = RunDirectory(path)
    if not os.path.lexists(directory.config):
        if (path / "sweep.json").is_file():
            raise ConfigError(
                f"{path} is a sweep of many runs. Go on with it by steploop sweep --resume {path}, or with one of its runs."
            )
        what = "holds no run (there is no config.json)" if path.is_dir() else "is no directory"
        raise ConfigError(
            f"{path} {what}. Give the directory that steploop run wrote, such as runs/cifar_amp-1."
        )
    try:
        refuse_irregular(path, _FILES)
    except DataError as error:
        raise CheckpointDamagedError(str(error)) from error
    if problem := unresumable(read_json(directory.config)):
        raise CheckpointDamagedError(
            f"{path} cannot be gone on with: {problem} The file was damaged or changed. Give --out for a new run."
        )
    return directory


class Status:
    """status.json: written at the start, after each evaluation and checkpoint, and at the end; by any thread.

    Args:
        directory: of the run; None: nothing is written, as by all ranks but one.
        values: the first entries.
    """

    def __init__(self, directory: RunDirectory | None, **values: Any) -> None:
        self._path = None if directory is None else directory.status
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "state": "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            **values,
        }
        self.update()

    def update(self, **values: Any) -> None:
        """Change some entries."""
        with self._lock:
            self._values |= values
            if self._path is not None:
                write_json(self._path, self._values)
