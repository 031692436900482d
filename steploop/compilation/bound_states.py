"""Remember whose tensors stand in the lists of inputs of compiled graphs."""

import itertools
from collections.abc import Sequence
from typing import Any

from steploop.core.state.train_state import TrainState

__all__ = ["Bound"]

_NUMBERS = itertools.count()


class Bound:
    """The states whose tensors are in the graphs' lists of inputs: the last step's results.

    Donated tensors are the same objects at every step, so the lists are made once and hold until other states
    come: a clone, one from a checkpoint, or one that an eager step gave.

    Attributes:
        tensors: a number of these tensors, never that of others.
        origin: a number of the states that these were made from by compiled steps; a graph fits all of them, or none.
    """

    __slots__ = ("_held", "origin", "tensors")

    def __init__(self) -> None:
        self.tensors = self.origin = next(_NUMBERS)
        self._held: list[tuple[Any, ...]] = []

    def holds(self, states: Sequence[TrainState]) -> bool:
        """Whether these are the bound states, with the same tensors and hyperparameters."""
        if len(states) != len(self._held):
            return False
        for state, (lease, tensors, hyper) in zip(states, self._held):  # noqa: B905  (of one length)
            if state.lease is not lease or state.tensors is not tensors or state.hyper is not hyper:
                return False
        return True

    def take(self, states: Sequence[TrainState]) -> None:
        """Bind states that come from elsewhere."""
        self._held = [(s.lease, s.tensors, s.hyper) for s in states]
        self.tensors = self.origin = next(_NUMBERS)

    def follow(self, states: Sequence[TrainState], *, same_tensors: bool) -> None:
        """Bind what a compiled step has made of the bound states."""
        self._held = [(s.lease, s.tensors, s.hyper) for s in states]
        if not same_tensors:
            self.tensors = next(_NUMBERS)
