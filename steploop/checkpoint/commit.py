"""The commit: a directory appears whole or not at all, and stays so through a crash or a power loss.

    .tmp-<name>-<pid>/  is written beside the target, each file flushed, then the directory itself
    rename to <name>    the one moment at which the checkpoint begins to exist
    flush the parent    from here on it survives a power loss

Where ``<name>`` exists already it is first renamed to ``.old-<name>`` (and the parent flushed), and removed last: at
every moment one of the two is there whole, and ``recover`` puts the old one back where the new one did not arrive.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from steploop.checkpoint.filesystem import FileWriter, Fs
from steploop.errors import CheckpointWriteError

__all__ = ["commit", "discard", "find", "probe", "remove_tree", "sweep", "write_error", "write_file"]

T = TypeVar("T")
_TEMPORARY: Final = re.compile(r"\.tmp-.*-(\d{1,10})", re.DOTALL)
_OLD: Final = ".old-"
_TRASH: Final = ".trash-"


def write_error(message: str, error: OSError) -> CheckpointWriteError:
    """A CheckpointWriteError that bears the system's ``errno``; its text ends in the system's own words."""
    raised = CheckpointWriteError(f"{message}: {error.strerror or error}")
    raised.errno = error.errno
    return raised


def write_file(fs: Fs, path: Path, write: Callable[[FileWriter], T]) -> T:
    """Create a file, let ``write`` fill it, and return its result once the file is on the disk."""
    file = fs.create(path)
    try:
        result = write(file)
        file.sync()
    except BaseException:
        _quietly(file.close)
        raise
    file.close()
    return result


def commit(
    fs: Fs, target: Path, write: Callable[[Path], T], *, overwrite: bool = False, tries: int = 3, wait_s: float = 0.5
) -> T:
    """Make the directory ``target`` from what ``write`` puts into an empty one, durably and at one moment.

    Args:
        fs: where.
        target: the directory that is to appear; its parent exists.
        write: fills the directory it is given; each file through ``write_file``.
        overwrite: take the place of a directory that has the name, instead of refusing.
        tries: how often to begin again from nothing after a system error (a full disk may be freed by another).
        wait_s: seconds to wait before the second try; twice as long before each further one.

    Returns:
        What ``write`` returned. The directory is on the disk.

    Raises:
        CheckpointWriteError: it could not be written; nothing of it is left, and what was there before is there.
            Where only the very last flush failed it says so: the directory is there, but may not outlive a power loss.
    """
    name = target.name.removeprefix("step-")
    temporary = target.with_name(f".tmp-{name}-{os.getpid()}")
    for attempt in range(1, tries + 1):
        try:
            result = _fill(fs, temporary, write)
            break
        except OSError as error:
            # A flush that failed is not repeated on the same file: the system may have dropped the pages already.
            _quietly(lambda: remove_tree(fs, temporary))
            if attempt == tries:
                raise write_error(f"{target} could not be written in {tries} tries", error) from error
            time.sleep(wait_s * 2 ** (attempt - 1))
        except BaseException:
            _quietly(lambda: remove_tree(fs, temporary))
            raise
    try:
        replaced = _set_aside(fs, target, overwrite=overwrite)
        fs.rename(temporary, target)
    except OSError as error:
        _quietly(lambda: remove_tree(fs, temporary))
        _quietly(lambda: recover(fs, target))
        raise write_error(f"{target} could not be put in place", error) from error
    try:
        fs.sync_directory(target.parent)
        if replaced is not None:
            remove_tree(fs, replaced)
    except OSError as error:
        raise write_error(
            f"{target} is visible and whole, but it is not certain that it would outlive a power loss", error
        ) from error
    return result


def _fill(fs: Fs, temporary: Path, write: Callable[[Path], T]) -> T:
    remove_tree(fs, temporary)  # it bears our own process id, so whoever left it is gone
    fs.make_directory(temporary)
    result = write(temporary)
    fs.sync_directory(temporary)
    return result


def _set_aside(fs: Fs, target: Path, *, overwrite: bool) -> Path | None:
    """Give what has the target's name another one, durably; None where nothing has it."""
    if not fs.is_directory(target):
        return None
    if not overwrite:
        raise FileExistsError(17, "it exists already: choose another name, or pass overwrite=True", str(target))
    old = target.with_name(_OLD + target.name)
    remove_tree(fs, old)
    fs.rename(target, old)
    fs.sync_directory(target.parent)
    return old


def find(fs: Fs, target: Path) -> Path:
    """Where the checkpoint ``target`` is: under its name, or under the one it had while it was being replaced."""
    old = target.with_name(_OLD + target.name)
    return old if not fs.is_directory(target) and fs.is_directory(old) else target


def recover(fs: Fs, target: Path) -> None:
    """Undo a replacement that did not happen, or clear away what it replaced."""
    old = target.with_name(_OLD + target.name)
    if not fs.is_directory(old):
        return
    if fs.is_directory(target):
        remove_tree(fs, old)
    else:
        fs.rename(old, target)
        fs.sync_directory(target.parent)


def remove_tree(fs: Fs, path: Path) -> None:
    """Remove a directory of files, if it is there; a link in it is removed, not followed."""
    if not fs.is_directory(path):
        return
    for name in fs.names(path):
        remove_tree(fs, path / name) if fs.is_directory(path / name) else fs.unlink(path / name)
    fs.remove_directory(path)


def discard(fs: Fs, path: Path) -> None:
    """Delete a checkpoint so that a kill on the way leaves no half of it under its name."""
    trash = path.with_name(f"{_TRASH}{path.name}-{os.getpid()}")
    remove_tree(fs, trash)
    fs.rename(path, trash)
    remove_tree(fs, trash)


def sweep(fs: Fs, directory: Path, *, alive: Callable[[int], bool] | None = None) -> list[str]:
    """Clear what crashed processes left in a directory of checkpoints; the names of what was there.

    Call it at a start, with the run locked, before anything is saved: a temporary directory with this process's own
    number then is from an earlier process of that number. What belongs to another process that lives is kept.

    Args:
        fs: where.
        directory: the parent of the checkpoints.
        alive: whether a process of that number runs.
    """
    found = []
    for name in fs.names(directory):
        owner = _TEMPORARY.fullmatch(name)
        if name.startswith(_OLD):
            recover(fs, directory / name.removeprefix(_OLD))
        elif name.startswith(_TRASH) or (owner and not (alive or _alive)(int(owner[1]))):
            remove_tree(fs, directory / name)
        else:
            continue
        found.append(name)
    return found


def _alive(pid: int) -> bool:
    """Whether another process of that number runs on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def probe(fs: Fs, directory: Path) -> None:
    """Find out before the first step whether checkpoints can be written here.

    Does once, with a small file, all that a commit does: create, write, flush, rename, flush the directory, remove.

    Raises:
        CheckpointWriteError: the directory is missing, read-only, no directory, or its disk or quota is full.
    """
    temporary = directory / f".tmp-probe-{os.getpid()}"
    try:
        remove_tree(fs, temporary)
        fs.make_directory(temporary)
        write_file(fs, temporary / "probe", lambda file: file.write(bytes(4096)))
        fs.sync_directory(temporary)
        renamed = temporary.with_name(f"{_TRASH}probe-{os.getpid()}")
        remove_tree(fs, renamed)
        fs.rename(temporary, renamed)
        fs.sync_directory(directory)
        remove_tree(fs, renamed)
    except OSError as error:
        _quietly(lambda: remove_tree(fs, temporary))
        raise write_error(
            f"Checkpoints cannot be written to {directory}. Choose a directory on a local disk that this user may "
            "write to and that has room",
            error,
        ) from error


def _quietly(act: Callable[[], object]) -> None:
    """Clean up after an error without hiding it."""
    try:
        act()
    except OSError:
        pass
