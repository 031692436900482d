"""Seed the global generators that a pass may draw from, and put them back: torch's, Python's and NumPy's."""

import ctypes
import random
from typing import Any, Self

import numpy as np
import torch

from steploop.core.seeds import fold_in

__all__ = ["SeededGenerators", "generators_of"]

_random: Any = np.random  # which does not declare the two functions that exchange its generator
_MT19937_POSITION = 624 * 4  # bytes: in the state of the generator the position stands behind 624 words


class _NumPy:
    """NumPy's global generator: another bit generator takes its place for a pass, for 2 us instead of 50.

    Saving and restoring its state costs 50 us. The exchange keeps the caller's stream and loses one thing: a second
    Gaussian that ``np.random.randn`` has computed and not given yet. Only where the caller's generator moved since the
    last pass can there be one, and then all of its state is kept.
    """

    def __init__(self) -> None:
        self._own = np.random.MT19937(0)
        self._callers: Any = None
        self._words: Any = None  # the first word and the position of the caller's generator, where they stand
        self._seen: tuple[int, int] | None = None

    def keep(self) -> tuple[Any, Any]:
        """What ``restore`` needs."""
        callers: Any = _random.get_bit_generator()
        if callers is self._own:  # a pass within a pass
            return callers, np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what is kept)
        if callers is not self._callers:
            self._callers, self._seen, self._words = callers, None, None
            if isinstance(callers, np.random.MT19937):
                address = callers.ctypes.state_address
                self._words = (
                    ctypes.c_uint32.from_address(address),
                    ctypes.c_int.from_address(address + _MT19937_POSITION),
                )
        now = None if self._words is None else (self._words[0].value, self._words[1].value)
        if now is not None and now == self._seen:
            return callers, None
        state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (likewise)
        # while a second Gaussian waits, it waits at the next pass too
        self._seen = None if state["has_gauss"] else now
        return callers, state if now is None or state["has_gauss"] else None

    def seed(self, seed: int) -> None:
        """Let NumPy draw from a generator of ours, seeded."""
        _random.set_bit_generator(self._own)
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002  (the global generator is what an objective may draw from)

    def restore(self, kept: tuple[Any, Any]) -> None:
        """Put the caller's generator back."""
        callers, state = kept
        _random.set_bit_generator(callers)
        if state is not None:
            np.random.set_state(state)  # noqa: NPY002  (likewise)


_NUMPY = _NumPy()


def generators_of(device: torch.device) -> tuple[torch.Generator, ...]:
    """The global generators of torch that a computation on ``device`` may draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return (torch.default_generator, torch.cuda.default_generators[index])
    if device.type == "mps":
        return (torch.default_generator, torch.mps._get_default_mps_generator())
    return (torch.default_generator,)


class SeededGenerators:
    """Keeps the generators of the caller on entering and puts them back on leaving; in between they are seeded.

    Args:
        generators: torch's.
        coordinates: seed at once, from these; without any, ``seed`` is called later.
    """

    __slots__ = ("_coordinates", "_generators", "_kept", "_kept_numpy", "_kept_python")

    def __init__(self, generators: tuple[torch.Generator, ...], *coordinates: int) -> None:
        self._generators = generators
        self._coordinates = coordinates

    def __enter__(self) -> Self:
        self._kept = [generator.get_state() for generator in self._generators]
        self._kept_python = random.getstate()
        self._kept_numpy = _NUMPY.keep()
        if self._coordinates:
            try:
                self.seed(*self._coordinates)
            except BaseException:
                self.__exit__()
                raise
        return self

    def seed(self, *coordinates: int) -> None:
        """Seed every generator from the place ``coordinates``."""
        seed = fold_in(*coordinates)
        for generator in self._generators:
            generator.manual_seed(seed)
        random.seed(seed)
        _NUMPY.seed(seed)

    def __exit__(self, *_: object) -> None:
        for generator, kept in zip(self._generators, self._kept, strict=True):
            generator.set_state(kept)
        random.setstate(self._kept_python)
        _NUMPY.restore(self._kept_numpy)
