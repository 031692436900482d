"""The one door to run directories: all files in them are opened here, because a stranger may have made them.

No link is followed, nothing is opened but regular files and directories, no more is read than a limit, and JSON is
read strictly: a hostile directory costs a bounded time and ends in a DataError that names the file.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from steploop.errors import DataError

__all__ = [
    "checkpoint_folders",
    "nested_deeper",
    "open_file",
    "parse_object",
    "phase_folders",
    "read_file",
    "read_record",
    "refuse_irregular",
    "step_folders",
]

RECORD_LIMIT: Final = 4 << 20  # bytes of config.json, status.json, capsule.json
MAX_DEPTH: Final = 32
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_STEP: Final = re.compile(r"step-(\d{1,18})", re.ASCII)
_PHASE: Final = re.compile(r"checkpoints(?:-phase-(\d{1,9}))?", re.ASCII)


@contextmanager
def open_folder(directory: Path, *below: str) -> Iterator[int]:
    """The descriptor of a directory; the folders ``below`` it must not be links.

    Raises:
        OSError: it does not exist, or one of them is a link or no directory.
    """
    fd = os.open(directory, _FOLDER)
    try:
        for name in below:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


@contextmanager
def open_file(directory: Path, name: str) -> Iterator[int]:
    """The descriptor of a regular file in a directory.

    Raises:
        FileNotFoundError: there is none of that name.
        DataError: it is a link, a pipe, a device, a directory, or cannot be opened.
    """
    try:
        with open_folder(directory) as folder:
            fd = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(directory / name, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DataError(f"{directory / name} is no regular file, and nothing else is read. Remove it.")
        yield fd
    finally:
        os.close(fd)


def _unreadable(path: Path, error: OSError) -> DataError:
    if path.is_symlink():
        return DataError(
            f"{path} is a link, and links in a run directory are not followed. Put the file itself there."
        )
    return DataError(f"{path} cannot be read: {error.strerror}.")


def read_file(directory: Path, name: str, *, limit: int) -> bytes | None:
    """All bytes of a regular file in a directory; None if there is no such file.

    Raises:
        DataError: it is a link, a pipe, a device or a directory, cannot be read, or has more than ``limit`` bytes.
    """
    try:
        with open_file(directory, name) as fd, os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(directory / name, error) from error
    if len(data) > limit:
        raise DataError(
            f"{directory / name} has more than {limit:,} bytes, and no run writes so many. It was damaged or changed."
        )
    return data


def read_record(
    directory: Path, name: str, *, limit: int = RECORD_LIMIT, depth: int = MAX_DEPTH
) -> dict[str, Any] | None:
    """The JSON object in a file of a directory; None if there is no such file.

    Args:
        directory: of a run, or a capsule.
        name: of the file.
        limit: bytes that are read at most.
        depth: levels that it may be nested.

    Raises:
        DataError: it cannot be read (see ``read_file``), or is not the JSON that a run writes.
    """
    data = read_file(directory, name, limit=limit)
    if data is None:
        return None
    try:
        return parse_object(data, depth=depth)
    except ValueError as error:
        raise DataError(
            f"{directory / name} is not the JSON that a run writes: {str(error)[:200]}. It was damaged or changed."
        ) from error


def parse_object(data: bytes, *, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers, at most ``depth`` levels.

    Raises:
        ValueError: it is something else; says what.
    """
    try:
        value = json.loads(data.decode(), parse_float=_finite, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"it is nested more than {depth} levels deep") from None
    if not isinstance(value, dict):
        raise ValueError("the outermost value is no object")  # noqa: TRY004  (every refusal here is a ValueError)
    if nested_deeper(value, depth):
        raise ValueError(f"it is nested more than {depth} levels deep")
    if b"\\u" in data:
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair: UnicodeEncodeError
    return value


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:30]} is not finite")
    return number


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def nested_deeper(value: Any, limit: int) -> bool:
    """Whether anything is nested more than ``limit`` deep, found level by level: nothing here recurses."""
    level = [value]
    for _ in range(limit):
        below = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for children in below for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def refuse_irregular(directory: Path, names: Iterable[str]) -> None:
    """Refuse a directory in which something else than a regular file has one of the names.

    Raises:
        DataError: it is a link, a pipe, a device or a directory.
    """
    for name in names:
        try:
            with open_file(directory, name):
                pass
        except FileNotFoundError:
            continue


def folders_in(directory: Path, *below: str) -> list[str]:
    """The names of the real directories in a directory, links left out; empty where there is none."""
    try:
        with open_folder(directory, *below) as fd, os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def step_folders(directory: Path, *below: str) -> list[Path]:
    """The directories ``step-<n>`` in a directory, by their number; links are left out."""
    found = [(int(m[1]), name) for name in folders_in(directory, *below) if (m := _STEP.fullmatch(name))]
    return [directory.joinpath(*below, name) for _, name in sorted(found)]


def phase_folders(run: Path) -> list[Path]:
    """The directories of a run that hold checkpoints, in the order of the phases."""
    phases = [(int(m[1] or 1), name) for name in folders_in(run) if (m := _PHASE.fullmatch(name))]
    return [run / name for _, name in sorted(phases)]


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run from the oldest to the newest: by phase, then by step."""
    return [folder for phase in phase_folders(run) for folder in step_folders(run, phase.name)]
