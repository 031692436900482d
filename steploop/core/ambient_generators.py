"""The generators that draws without one come from: torch's, Python's and NumPy's global ones."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["ambient_kept", "generators_of", "generators_of_all_devices", "seed_ambient"]


def generators_of(device: torch.device) -> tuple[torch.Generator, ...]:
    """The global generators of torch that a computation on ``device`` may draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return (torch.default_generator, torch.cuda.default_generators[index])
    if device.type == "mps":
        return (torch.default_generator, torch.mps._get_default_mps_generator())
    return (torch.default_generator,)


def generators_of_all_devices() -> tuple[torch.Generator, ...]:
    """The global generators of torch on the CPU and, where CUDA is in use, on its devices."""
    return (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ()))  # type: ignore[no-untyped-call]


def seed_ambient(seed: int, generators: tuple[torch.Generator, ...]) -> None:
    """Seed Python's and NumPy's generator, and these of torch."""
    for generator in generators:
        generator.manual_seed(seed)  # torch.manual_seed costs a hundred times as much
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  (the global one is what objectives and data sets draw from)


@contextmanager
def ambient_kept(generators: tuple[torch.Generator, ...]) -> Iterator[None]:
    """Leave Python's and NumPy's generator, and these of torch, as they were, after any draws inside."""
    kept = [(generator, generator.get_state()) for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (likewise)
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  (likewise)
