"""A whole file in the place of an older one: a reader sees the one or the other, and a kill leaves one of the two."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_file"]


def replace_file(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write ``data`` beside ``path``, as ``.name-pid``, and let it take that name.

    Args:
        path: what is replaced, or made.
        data: all of the new content.
        durable: whether the content is on the disk before it takes the name; the directory is the caller's to flush.

    Raises:
        OSError: it could not be written; the older file is as it was, and nothing stands beside it.
    """
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
