"""Seed the global generators that a pass may draw from, and put them back: torch's, Python's and NumPy's."""

import _random
import ctypes
import random
import sys
from typing import Any, Self

import numpy as np
import torch

from steploop.core.ambient_generators import seed_ambient
from steploop.core.seeds import fold_in

__all__ = ["SeededGenerators", "python_mark"]

_GLOBAL: Any = random._inst  # what random.random and the others are methods of
_NUMPY_RANDOM: Any = np.random  # which does not declare the two functions that exchange its generator
_STATE_BYTES = (
    625 * 4
)  # of a Mersenne twister: 624 words and a position, in Python's behind one another the other way round


class _Words:
    """The state of a Mersenne twister in memory: copied for 0.2 us, where ``getstate`` makes 625 integers in 7 us.

    Args:
        address: where its 625 words begin.
        position: where among them the position stands: the first or the last. It moves with every draw, and the other
            words with every 624th and with a seed; of these one in the middle is looked at, for a seed leaves the first as it is.
    """

    def __init__(self, address: int, *, position: int) -> None:
        self._address = address
        self._position = position
        # read by index: a tenth of the time of a ctypes number
        self.view = memoryview((ctypes.c_uint32 * 625).from_address(address)).cast("B").cast("I")

    def mark(self) -> tuple[int, int]:
        """What differs after a draw."""
        return self.view[self._position], self.view[300]

    def copy(self) -> bytes:
        """The state."""
        return ctypes.string_at(self._address, _STATE_BYTES)

    def put(self, state: bytes) -> None:
        """Take a state that ``copy`` gave."""
        ctypes.memmove(self._address, state, _STATE_BYTES)


def _python_words() -> _Words | None:
    """The words of Python's global generator, behind the header that every object of CPython has.

    Whether they stand there is tried on a generator of our own; None where they do not.
    """
    header = object.__basicsize__
    if sys.implementation.name != "cpython" or _random.Random.__basicsize__ < header + _STATE_BYTES:
        return None
    own = random.Random(1)
    own.random()
    words = (ctypes.c_uint32 * 625).from_buffer_copy(_Words(id(own) + header, position=0).copy())
    _, (*state, position), _ = own.getstate()
    return _Words(id(_GLOBAL) + header, position=0) if list(words) == [position, *state] else None


class _Python:
    """Python's global generator."""

    def __init__(self) -> None:
        self.words = _python_words()

    def keep(self) -> Any:
        """What ``restore`` needs; the second Gaussian of a pair that ``random.gauss`` made stands in an attribute."""
        return random.getstate() if self.words is None else (self.words.copy(), _GLOBAL.gauss_next)

    def restore(self, kept: Any) -> None:
        """Put the caller's state back."""
        if self.words is None:
            random.setstate(kept)
        else:
            state, _GLOBAL.gauss_next = kept
            self.words.put(state)


class _NumPy:
    """NumPy's global generator: for a pass that draws from it another bit generator takes its place.

    The exchange costs 2 us, where saving and restoring the state costs 50. It keeps the caller's stream and loses one
    thing: a second Gaussian that ``np.random.randn`` has computed and not given yet. Only where the caller's generator
    moved since the last pass can there be one, and then all of its state is kept.
    """

    def __init__(self) -> None:
        self._own = np.random.MT19937(0)
        self._callers: Any = None
        self._seen: tuple[int, int] | None = None
        self.words: _Words | None = None  # of the caller's generator

    def look(self) -> Any:
        """The generator that NumPy draws from now; ``words`` are its own afterwards."""
        current: Any = _NUMPY_RANDOM.get_bit_generator()
        if current is not self._callers and current is not self._own:
            self._callers, self._seen, self.words = current, None, None
            if isinstance(current, np.random.MT19937):
                self.words = _Words(current.ctypes.state_address, position=624)
        return current

    def keep(self) -> tuple[Any, Any]:
        """What ``restore`` needs."""
        current = self.look()
        if current is self._own:  # a pass within a pass
            return current, np.random.get_state(legacy=False)  # noqa: NPY002  (the global generator is what is kept)
        now = None if self.words is None else self.words.mark()
        if now is not None and now == self._seen:
            return current, None
        state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  (likewise)
        # while a second Gaussian waits, it waits at the next pass too
        self._seen = None if state["has_gauss"] else now
        return current, state if now is None or state["has_gauss"] else None

    def exchange(self) -> None:
        """Let NumPy draw from a generator of ours."""
        _NUMPY_RANDOM.set_bit_generator(self._own)

    def restore(self, kept: tuple[Any, Any]) -> None:
        """Put the caller's generator back."""
        callers, state = kept
        _NUMPY_RANDOM.set_bit_generator(callers)
        if state is not None:
            np.random.set_state(state)  # noqa: NPY002  (likewise)


_PYTHON = _Python()
_NUMPY = _NumPy()
_OWN_NUMPY_WORDS = _Words(_NUMPY._own.ctypes.state_address, position=624)


def python_mark() -> Any:
    """What differs after a draw from Python's global generator."""
    return random.getstate() if _PYTHON.words is None else (*_PYTHON.words.mark(), _GLOBAL.gauss_next)


# positions and words of Python's generator and of NumPy's, and the second Gaussian of a pair that ``random.gauss`` made
_Marks = tuple[int, int, int, int, float | None]


class SeededGenerators:
    """Keeps the generators of the caller on entering and puts them back on leaving; in between they are seeded.

    Args:
        generators: torch's.
        coordinates: seed at once, from these; if it is empty, ``seed`` is called later.
        others: seed Python's and NumPy's too. False only watches them, for a fifth of the time: ``moved`` says whether
            something was drawn, and leaving puts them back in either case.
    """

    __slots__ = (
        "_coordinates",
        "_generators",
        "_kept",
        "_marks",
        "_numpy",
        "_others",
        "_others_kept",
        "_seen_unmoved",
    )

    # of the callers' generators that were watched last: their marks, and both states
    _last: tuple[_Words | None, _Marks | None, bytes, bytes] = (None, None, b"", b"")

    def __init__(
        self, generators: tuple[torch.Generator, ...], coordinates: tuple[int, ...], others: bool
    ) -> None:
        self._generators = generators
        self._coordinates = coordinates
        # what cannot be watched is seeded
        self._others = others or _PYTHON.words is None or _NUMPY.look() is _NUMPY._own or _NUMPY.words is None
        self._numpy = _OWN_NUMPY_WORDS if self._others else _NUMPY.words

    def __enter__(self) -> Self:
        self._seen_unmoved = False
        self._kept = [(generator, generator.get_state()) for generator in self._generators]
        if self._others:
            self._others_kept: Any = _PYTHON.keep(), _NUMPY.keep()
        else:
            self._marks, numpy = self._look(), self._numpy
            kept = SeededGenerators._last
            if kept[1] != self._marks or kept[0] is not numpy:  # something was drawn since
                kept = numpy, self._marks, _PYTHON.words.copy(), numpy.copy()  # type: ignore[union-attr]  # watched
                SeededGenerators._last = kept
            self._others_kept = kept
        if self._coordinates:
            try:
                self.seed(*self._coordinates)
            except BaseException:
                self.__exit__()
                raise
        return self

    def seed(self, *coordinates: int) -> None:
        """Seed the generators from the place ``coordinates``."""
        seed = fold_in(*coordinates)
        if self._others:
            _NUMPY.exchange()
            seed_ambient(seed, self._generators)
            self._marks = self._look()
            return
        self._seen_unmoved = False
        for generator in self._generators:
            generator.manual_seed(seed)

    @property
    def watched(self) -> bool:
        """Whether Python's and NumPy's generators are watched only."""
        return not self._others

    def moved(self) -> bool:
        """Whether something was drawn from Python's or NumPy's generator since they were seeded or kept.

        After a no, leaving does not look again: call it when the last draw can have been made.
        """
        self._seen_unmoved = self._marks is not None and self._look() == self._marks
        return not self._seen_unmoved

    def _look(self) -> _Marks | None:
        """What differs after a draw; None where that cannot be read."""
        if self._numpy is None or _PYTHON.words is None:
            return None
        python, numpy = _PYTHON.words.view, self._numpy.view
        return python[0], python[300], numpy[624], numpy[300], _GLOBAL.gauss_next

    def __exit__(self, *_: object) -> None:
        for generator, kept in self._kept:
            generator.set_state(kept)
        if self._others:
            python, numpy = self._others_kept
            _PYTHON.restore(python)
            _NUMPY.restore(numpy)
        elif not self._seen_unmoved and self.moved():
            numpy, (*_, _GLOBAL.gauss_next), words, state = self._others_kept
            _PYTHON.words.put(words)  # type: ignore[union-attr]  # likewise
            numpy.put(state)
