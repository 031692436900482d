"""Set glibc's thresholds for returning memory, before a run trains, and record them."""

import ctypes
import sys

__all__ = ["tune_allocator"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3), malloc.h
_MMAP_BYTES = 32 << 20  # the largest that glibc accepts on 64 bits
_TRIM_BYTES = (2 << 30) - 1  # the largest int: mallopt takes no more


def tune_allocator() -> dict[str, int]:
    """Let glibc keep freed memory for the next step.

    By default, tensors of some hundred KiB and more are mapped and unmapped at every step, and the kernel clears
    each page again: a fifth and more of a small CNN's step on the CPU.

    Returns:
        What was set, for the record: nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return {}
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return {}
    wanted = {
        "M_MMAP_THRESHOLD": (_M_MMAP_THRESHOLD, _MMAP_BYTES),
        "M_TRIM_THRESHOLD": (_M_TRIM_THRESHOLD, _TRIM_BYTES),
    }
    return {name: value for name, (key, value) in wanted.items() if mallopt(key, ctypes.c_int(value)) == 1}
