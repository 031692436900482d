"""Find kernel files in torch's cache that a compile left unfinished when it was interrupted, and delete them."""

import os
import struct
from pathlib import Path

__all__ = ["remove_truncated"]

_HEADER = 64  # bytes of a 64-bit ELF header


def remove_truncated() -> list[Path]:
    """Delete the truncated kernel files of Inductor's cache, which are compiled anew; those that were deleted.

    A linker that is killed leaves a part of its output under the final name, where Inductor takes it for a whole file at
    every later compile. A file on which another process is at work is left alone: it holds the file's lock.
    """
    from torch._inductor.codecache import get_lock_dir
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    removed = []
    for folder in os.scandir(cache_dir()) if Path(cache_dir()).is_dir() else ():
        if len(folder.name) != 2 or not folder.is_dir():  # kernels lie in folders of two letters
            continue
        for path in Path(folder.path).glob("*.so"):
            if not _truncated(path):
                continue
            try:
                with FileLock(Path(get_lock_dir()) / f"{path.name.split('.')[0]}.lock", timeout=0):
                    if _truncated(path):
                        path.unlink()
                        removed.append(path)
            except TimeoutError:  # somebody is writing it
                continue
    return removed


def _truncated(path: Path) -> bool:
    """Whether a shared library ends before the table of its sections, which a linker writes last."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    if len(header) < _HEADER:
        return True
    if header[:5] != b"\x7fELF\x02":  # no 64-bit ELF file: another system's libraries
        return False
    order = "<" if header[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", header, 40)
    length, count = struct.unpack_from(f"{order}HH", header, 58)
    return bool(size < table + length * count)
