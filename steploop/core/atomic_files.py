"""Replace a file atomically: write a temporary file in its folder, then rename it."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_file"]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def replace_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write ``data`` to ``.name-pid`` in the same folder, and rename it to ``path``. No link is followed.

    Args:
        path: what is replaced, or made.
        data: all of the new content.
        durable: whether the content is on the disk before it takes the name; the directory is the caller's to flush.

    Raises:
        OSError: it could not be written; the older file is as it was, and the new one is removed.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(FileNotFoundError):  # of a process of the same number that was killed; or planted
        temporary.unlink()
    try:
        with open(os.open(temporary, _NEW, 0o666), "wb") as file:  # noqa: PTH123  (a descriptor, not a path)
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
