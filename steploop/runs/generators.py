"""Restore the random number generators after something was tried."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generators_kept"]


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's generators as they were, after any draws inside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the one that recipes draw from)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
