"""Define the file operations that checkpoints need, and implement them for local disks.

Everything that writes or reads a checkpoint goes through an ``Fs``. Tests put another in its place: one that models
a power loss (what was not flushed is lost, torn or reordered) and one whose n-th operation fails.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

__all__ = ["LOCAL", "FileReader", "FileWriter", "Fs", "LocalFs"]

_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO without a writer would wait for ever
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FileWriter(Protocol):
    """A new file, open for writing."""

    def write(self, data: memoryview | bytes) -> None:
        """Append all of ``data``."""

    def sync(self) -> None:
        """Flush what was written to the disk."""

    def close(self) -> None:
        """Close the file; a delayed write error of the system is raised here."""


class FileReader(Protocol):
    """A regular file, open for reading."""

    @property
    def size(self) -> int:
        """Its size in bytes when it was opened."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset`` on; return the bytes read, fewer only at the end."""

    def close(self) -> None:
        """Close the file."""


class Fs(Protocol):
    """Files and directories; every method raises ``OSError`` on failure."""

    def make_directory(self, path: Path) -> None:
        """Create a directory; ``FileExistsError`` if the name is taken."""

    def create(self, path: Path) -> FileWriter:
        """Create a file; ``FileExistsError`` if the name is taken, even by a link."""

    def sync_directory(self, path: Path) -> None:
        """Flush the names in a directory to the disk."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename ``source`` to ``target`` atomically."""

    def names(self, path: Path) -> Sequence[str]:
        """List the names in a directory, sorted; empty if it does not exist."""

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""

    def is_directory(self, path: Path) -> bool:
        """Whether ``path`` is a directory and not a link to one."""

    def exists(self, path: Path) -> bool:
        """Whether the path exists; links are followed."""

    def open(self, directory: Path, name: str) -> FileReader:
        """Open a regular file of a directory; ``OSError`` for a link, a pipe, a device or a directory."""


class _LocalWriter:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while rest:  # the system may take less than it is given
            rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _LocalReader:
    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        os.close(self._fd)


class LocalFs:
    """Local files, with the usual modes (0666 and 0777 less the umask)."""

    def make_directory(self, path: Path) -> None:
        """Create a directory."""
        path.mkdir()

    def create(self, path: Path) -> FileWriter:
        """Create a file."""
        return _LocalWriter(os.open(path, _NEW_FILE, 0o666))

    def sync_directory(self, path: Path) -> None:
        """Flush the names in a directory."""
        fd = os.open(path, _FOLDER)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within one file system."""
        os.rename(source, target)  # noqa: PTH104  (Path.rename is the same call by another name; this one reads as POSIX)

    def names(self, path: Path) -> Sequence[str]:
        """List a directory."""
        try:
            return sorted(entry.name for entry in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def unlink(self, path: Path) -> None:
        """Remove a file or a link."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def is_directory(self, path: Path) -> bool:
        """Whether the path is a directory and no link."""
        return path.is_dir() and not path.is_symlink()

    def exists(self, path: Path) -> bool:
        """Whether the path exists."""
        return path.exists()

    def open(self, directory: Path, name: str) -> FileReader:
        """Open a regular file by its name in an open directory: no part of the path can be swapped."""
        folder = os.open(directory, _FOLDER)
        try:
            fd = os.open(name, _READ, dir_fd=folder)
        finally:
            os.close(folder)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(directory / name))
        return _LocalReader(fd, status.st_size)


LOCAL: Final = LocalFs()
