"""Lock a run directory for one process, by a POSIX record lock on a file of its own.

``lockf`` and not ``flock`` (which the filelock library takes): an flock belongs to the open file, so a data-loading
worker that was forked inherits it, and one that hangs keeps the run locked after the run itself is dead. A POSIX lock
belongs to the process and goes with it. Its one trap is that it is dropped when the process closes *any* descriptor
of the file, so the file is opened once, here, and a process that holds the lock never opens it again: who holds it
is written to a second file.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import attrs

from steploop.core.atomic_files import replace_file
from steploop.errors import CheckpointWriteError, DataError, RunLockedError
from steploop.runs.directory_reader import read_record
from steploop.runs.record_values import is_count
from steploop.runs.safe_text import safe_text

__all__ = ["Owner", "run_lock", "run_owner"]

_LOCK: Final = "run.lock"
_OWNER: Final = "run.owner.json"
_LIMIT: Final = 4096  # bytes of the owner's file
# O_NONBLOCK: a FIFO of that name is not waited for
_SAFELY: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# A look at the lock takes it for a moment (shared); a starter that meets one tries again.
_PATIENCE_S: Final = 0.2
_held: dict[tuple[int, int], "Owner"] = {}  # (device, inode) of each run directory locked by this process


@attrs.frozen
class Owner:
    """The process that runs in a directory.

    Attributes:
        pid: its process number.
        host: the name of its machine.
        started: when, in UTC, to the second.
    """

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


@contextmanager
def run_lock(directory: Path) -> Iterator[Owner]:
    """Own a run directory in a ``with`` block; the system frees it if the process dies.

    Args:
        directory: the run directory, which exists. On a network file system locks may not hold.

    Raises:
        RunLockedError: another process owns it, or this one does already. Nothing was written.
        CheckpointWriteError: the lock file cannot be made.
    """
    key = _identity(directory)
    if key in _held:  # opening the file again and closing it would free the lock
        raise _locked(directory, _held[key])
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | _SAFELY, 0o666)
    except OSError as error:
        raise _unlockable(directory, error) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _unlockable(directory, OSError(errno.EINVAL, f"its {_LOCK} is no regular file"))
        if not _take(fd):
            raise _locked(directory, _read_owner(directory))
        owner = Owner(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
        _held[key] = owner
        try:
            try:
                _write_owner(directory, owner)
            except OSError as error:
                raise _unlockable(directory, error) from error
            yield owner
        finally:
            if owner.pid == os.getpid():  # and not a fork that leaves by the same door
                (directory / _OWNER).unlink(missing_ok=True)
            del _held[key]
    finally:
        os.close(fd)


def run_owner(directory: Path) -> Owner | None:
    """Return the process that owns a run directory now, or None; never wait."""
    if (owner := _held.get(_identity(directory))) is not None:
        return owner
    try:
        fd = os.open(directory / _LOCK, os.O_RDONLY | _SAFELY)
    except OSError:  # no lock, or something else of its name, which no run holds
        return None
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read_owner(directory) if error.errno in {errno.EACCES, errno.EAGAIN} else None
    finally:
        os.close(fd)  # frees the shared lock too
    return None


def _identity(directory: Path) -> tuple[int, int]:
    status = directory.stat()
    return status.st_dev, status.st_ino


def _take(fd: int) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PATIENCE_S / 10)
        else:
            return True


def _write_owner(directory: Path, owner: Owner) -> None:
    replace_file(directory / _OWNER, json.dumps(attrs.asdict(owner)).encode())


def _read_owner(directory: Path) -> Owner:
    """Read the owner's record, which may be missing for an instant or out of date."""
    try:
        said = read_record(directory, _OWNER, limit=_LIMIT) or {}
    except DataError:
        said = {}
    pid, host, started = said.get("pid"), said.get("host"), said.get("started")
    return Owner(
        pid if isinstance(pid, int) and is_count(pid) else 0,
        safe_text(host) if isinstance(host, str) else "an unknown host",
        safe_text(started) if isinstance(started, str) else "an unknown time",
    )


def _unlockable(directory: Path, error: OSError) -> CheckpointWriteError:
    raised = CheckpointWriteError(
        f"The run directory {directory} cannot be locked: {error.strerror}. Choose one on a disk with free space "
        "that this user may write to."
    )
    raised.errno = error.errno
    return raised


def _locked(directory: Path, owner: Owner) -> RunLockedError:
    return RunLockedError(
        f"The run directory {directory} is in use by {owner}. Wait for it to end, stop it, or choose another directory."
    )
