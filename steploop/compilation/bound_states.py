"""Remember whose tensors stand in the lists of inputs of compiled graphs."""

import itertools
from collections.abc import Sequence
from typing import Any

from steploop.core.state.train_state import TrainState

__all__ = ["Bound"]

_GENERATIONS = itertools.count()


class Bound:
    """The states whose tensors are in the graphs' lists of inputs: the last step's results.

    Donated tensors are the same objects at every step, so the lists are made once and hold until other states
    come: a clone, one from a checkpoint, or one that an eager step gave.
    """

    __slots__ = ("_held", "generation")

    def __init__(self) -> None:
        self.generation = next(_GENERATIONS)
        self._held: list[tuple[Any, ...]] = []

    def holds(self, states: Sequence[TrainState]) -> bool:
        """Whether these are the bound states, with the same tensors and hyperparameters."""
        if len(states) != len(self._held):
            return False
        for state, (lease, tensors, hyper) in zip(states, self._held, strict=True):
            if state.lease is not lease or state.tensors is not tensors or state.hyper is not hyper:
                return False
        return True

    def take(self, states: Sequence[TrainState], *, same_tensors: bool) -> None:
        """Bind these states; if their tensors changed, remake every list of inputs."""
        self._held = [(s.lease, s.tensors, s.hyper) for s in states]
        if not same_tensors:
            self.generation = next(_GENERATIONS)
