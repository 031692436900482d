"""Commit a directory atomically: it appears whole or not at all, even through a power loss.

    .tmp-<name>-<pid>/  is written in the same folder, each file flushed, then the directory itself
    rename to <name>    the one moment at which the checkpoint begins to exist
    flush the parent    from here on it survives a power loss

Where ``<name>`` exists already it is first renamed to ``.old-<name>``, and removed last: at every moment one of the two
is there whole, and ``recover`` puts the old one back where the new one did not arrive.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from steploop.checkpoint.storage.local import FileWriter, Fs
from steploop.errors import CheckpointWriteError

__all__ = [
    "OLD",
    "commit",
    "find",
    "quietly",
    "recover",
    "remove_tree",
    "write_bytes",
    "write_error",
    "write_file",
]

T = TypeVar("T")
# Waiting helps against a full disk or a flaky one, not against these.
_HOPELESS: Final = {
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
OLD: Final = ".old-"


def write_error(message: str, error: OSError) -> CheckpointWriteError:
    """Make a CheckpointWriteError with the system's ``errno`` and message."""
    raised = CheckpointWriteError(f"{message}: {error.strerror or error}")
    raised.errno = error.errno
    return raised


def write_file(fs: Fs, path: Path, write: Callable[[FileWriter], T]) -> T:
    """Create a file, let ``write`` fill and flush it, close it; return what ``write`` returned."""
    file = fs.create(path)
    try:
        result = write(file)
    except BaseException:
        quietly(file.close)
        raise
    file.close()
    return result


def write_bytes(fs: Fs, path: Path, data: bytes) -> None:
    """Create a file of these bytes and flush it to the disk."""

    def write(file: FileWriter) -> None:
        file.write(data)
        file.sync()

    write_file(fs, path, write)


def commit(
    fs: Fs,
    target: Path,
    write: Callable[[Path], T],
    *,
    overwrite: bool = False,
    tries: int = 3,
    wait_s: float = 0.5,
) -> T:
    """Create the directory ``target`` atomically and durably, filled by ``write``.

    Args:
        fs: the storage.
        target: the directory that is to appear; its parent exists.
        write: fills the directory it is given; each file through ``write_file`` or ``write_bytes``.
        overwrite: take the place of a directory that has the name, instead of refusing.
        tries: how often to begin again from nothing after a system error (a full disk may be freed by another).
        wait_s: seconds to wait before the second try; twice as long before each further one.

    Returns:
        What ``write`` returned. The directory is on the disk.

    Raises:
        CheckpointWriteError: it could not be written; nothing of it is left, and what was there before is there.
            Where only the very last flush failed it says so: the directory is there, but may not outlive a power loss.
    """
    if not overwrite and fs.exists(target):
        raise write_error(
            f"{target} exists already: choose another name, or pass overwrite=True", _existing(target)
        )
    name = target.name.removeprefix("step-")
    temporary = target.with_name(f".tmp-{name}-{os.getpid()}")
    for attempt in range(1, tries + 1):
        try:
            result = _fill(fs, temporary, write)
            break
        except OSError as error:
            # A flush that failed is not repeated on the same file: the system may have dropped the pages already.
            quietly(lambda: remove_tree(fs, temporary))
            if attempt == tries or error.errno in _HOPELESS:
                raise write_error(
                    f"{target} could not be written (try {attempt} of {tries})", error
                ) from error
            time.sleep(wait_s * 2 ** (attempt - 1))
        except BaseException:
            quietly(lambda: remove_tree(fs, temporary))
            raise
    try:
        replaced = _set_aside(fs, target)
        fs.rename(temporary, target)
    except OSError as error:
        quietly(lambda: remove_tree(fs, temporary))
        quietly(lambda: recover(fs, target))
        raise write_error(f"{target} could not be put in place", error) from error
    try:
        fs.sync_directory(target.parent)
    except OSError as error:
        raise write_error(
            f"{target} is visible and whole, but it is not certain that it would outlive a power loss", error
        ) from error
    quietly(lambda: remove_tree(fs, replaced))  # what is left of it is swept at the next start
    return result


def _existing(target: Path) -> OSError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))


def _fill(fs: Fs, temporary: Path, write: Callable[[Path], T]) -> T:
    remove_tree(fs, temporary)  # it bears our own process id, so whoever left it is gone
    fs.make_directory(temporary)
    result = write(temporary)
    fs.sync_directory(temporary)
    return result


def _set_aside(fs: Fs, target: Path) -> Path:
    """Rename an existing target to ``.old-<name>``; return that path in any case."""
    old = target.with_name(OLD + target.name)
    if fs.is_directory(target):
        remove_tree(fs, old)
        fs.rename(target, old)
    return old


def find(fs: Fs, target: Path) -> Path:
    """Find a checkpoint under its name, or under ``.old-<name>`` after a crash."""
    old = target.with_name(OLD + target.name)
    return old if not fs.is_directory(target) and fs.is_directory(old) else target


def recover(fs: Fs, target: Path) -> None:
    """Undo a replacement that was cut off, or remove what it replaced."""
    old = target.with_name(OLD + target.name)
    if not fs.is_directory(old):
        return
    if fs.is_directory(target):
        remove_tree(fs, old)
    else:
        fs.rename(old, target)
        fs.sync_directory(target.parent)


def remove_tree(fs: Fs, path: Path) -> None:
    """Remove a directory if it exists; remove links in it, never follow them."""
    if not fs.is_directory(path):
        return
    for name in fs.names(path):
        remove_tree(fs, path / name) if fs.is_directory(path / name) else fs.unlink(path / name)
    fs.remove_directory(path)


def quietly(act: Callable[[], object]) -> None:
    """Run a clean-up and ignore its OSError, so that the first error stays visible."""
    with contextlib.suppress(OSError):
        act()
