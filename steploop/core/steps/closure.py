"""Closures for optimizers that evaluate the loss themselves: pure steps in, what torch expects out."""

from collections.abc import Callable
from typing import Any

import torch

from steploop.core.state.train_state import TrainState
from steploop.core.steps.clip import unscale_and_clip
from steploop.errors import ObjectiveError

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one optimizer step: each goes on from the buffers and passes of the one before.

    Attributes:
        last: the state after the newest evaluation.
    """

    def __init__(self, state: TrainState, closure: Callable[[TrainState], TrainState]) -> None:
        self._function = closure
        self._start = state
        self.last = state
        self._unused: list[int] | None = (
            None  # versions of the parameters at an evaluation that was not asked for
        )

    def first(self) -> TrainState:
        """The state with unscaled gradients: those it has, or those of a first evaluation."""
        state = self._start
        if state.flight.grads is None or state.flight.grad_norm is None:
            state = self._evaluated(state)
            self._unused = [leaf._version for leaf in state.tensors.leaves]
        self.last = state
        return state

    def closure(self) -> Any:
        """What ``optimizer.step`` calls: the loss, with gradients in ``.grad``."""
        leaves = self.last.tensors.leaves
        unused, self._unused = self._unused, None
        if unused is None or unused != [leaf._version for leaf in leaves]:
            # a first evaluation that is not used leaves no trace: buffers and draws are those of the step's beginning
            before = self.last if unused is None else self._start
            self.last = self._evaluated(before.replace(generation=before.lease.generation))
        grads = self.last.flight.grads
        for leaf, grad in zip(leaves, grads.values, strict=True):  # type: ignore[union-attr]  # just evaluated
            leaf.grad = grad
        return self.last.flight.loss

    def _evaluated(self, state: TrainState) -> TrainState:
        leaves = state.tensors.leaves
        with torch.enable_grad():
            state = self._function(state)
        if (
            not isinstance(state, TrainState)
            or state.flight.grads is None
            or state.tensors.leaves is not leaves
        ):
            raise ObjectiveError(
                "optimizer_step: the closure must return the state that it was given, with gradients: "
                "backward_scaled(forward_loss(state, batch, objective))."
            )
        return state if state.flight.grad_norm is not None else unscale_and_clip(state, max_norm=float("inf"))
