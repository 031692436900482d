"""Delete checkpoints and what crashes left; check that a directory is writable."""

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from steploop.checkpoint.storage.commit import (
    OLD,
    find,
    quietly,
    recover,
    remove_tree,
    write_bytes,
    write_error,
)
from steploop.checkpoint.storage.local import Fs

__all__ = ["discard", "make_directories", "probe", "sweep"]

_TEMPORARY: Final = re.compile(r"\.tmp-.*-(\d{1,10})", re.DOTALL)
_TRASH: Final = ".trash-"


def discard(fs: Fs, path: Path) -> None:
    """Delete a checkpoint; a kill on the way leaves no half of it under its name."""
    trash = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
    remove_tree(fs, trash)
    fs.rename(find(fs, path), trash)
    remove_tree(fs, trash)


def sweep(fs: Fs, directory: Path, *, alive: Callable[[int], bool] | None = None) -> list[str]:
    """Remove what crashed processes left in a directory of checkpoints; return the names.

    Call it at a start, with the run locked, before anything is saved: a temporary directory with this process's own
    number then is from an earlier process of that number. What belongs to another process that lives is kept.

    Args:
        fs: the storage.
        directory: the parent of the checkpoints.
        alive: whether a process of that number runs.
    """
    found = []
    for name in fs.names(directory):
        owner = _TEMPORARY.fullmatch(name)
        if name.startswith(OLD):
            recover(fs, directory / name.removeprefix(OLD))
        elif name.startswith(_TRASH) or (owner and not (alive or _alive)(int(owner[1]))):
            remove_tree(fs, directory / name)
        else:
            continue
        found.append(name)
    return found


def _alive(pid: int) -> bool:
    """Whether another process with this number runs on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def make_directories(fs: Fs, path: Path) -> None:
    """Create a directory and its parents durably, if they do not exist.

    Raises:
        CheckpointWriteError: one of them cannot be made.
    """
    missing = list(itertools.takewhile(lambda p: not fs.exists(p), (path, *path.parents)))
    try:
        for directory in reversed(missing):
            fs.make_directory(directory)
            fs.sync_directory(directory.parent)
    except OSError as error:
        raise write_error(f"The directory {path} cannot be created. Choose another", error) from error


def probe(fs: Fs, directory: Path) -> None:
    """Check before the first step that checkpoints can be written here.

    Does once, with a small file, all that a commit does: create, write, flush, rename, flush the directory, remove.

    Raises:
        CheckpointWriteError: the directory is missing, read-only, no directory, or its disk or quota is full.
    """
    temporary = directory / f".tmp-probe-{os.getpid()}"
    try:
        remove_tree(fs, temporary)
        fs.make_directory(temporary)
        write_bytes(fs, temporary / "probe", bytes(4096))
        fs.sync_directory(temporary)
        renamed = temporary.with_name(f"{_TRASH}probe-{os.getpid()}")
        remove_tree(fs, renamed)
        fs.rename(temporary, renamed)
        fs.sync_directory(directory)
        remove_tree(fs, renamed)
    except OSError as error:
        quietly(lambda: remove_tree(fs, temporary))
        raise write_error(
            f"Checkpoints cannot be written to {directory}. Choose a directory on a local disk that this user may "
            "write to and that has room",
            error,
        ) from error
