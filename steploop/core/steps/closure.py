"""Closures for optimizers that evaluate the loss themselves: pure steps in, what torch expects out."""

from collections.abc import Callable
from typing import Any

import torch

from steploop.core.state.copying import lazy_clone
from steploop.core.state.parts import TensorValues
from steploop.core.state.train_state import TrainState
from steploop.core.steps.clip import unscale_and_clip
from steploop.core.trees import map_tensors, named_leaves
from steploop.errors import ObjectiveError

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one optimizer step: each goes on from the buffers and passes of the one before.

    Attributes:
        last: the state after the newest evaluation.
        finite: whether every evaluation was finite.
    """

    def __init__(self, state: TrainState, closure: Callable[[TrainState], TrainState]) -> None:
        self._function = closure
        self._start = state
        self.last = state
        self.finite = True
        self._unused: list[int] | None = (
            None  # versions of the parameters at an evaluation that was not asked for
        )
        self._kept: TensorValues | None = None
        self._kept_hyper: tuple[Any, ...] = ()

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
        if state.flight.grad_norm is None:
            state = unscale_and_clip(state, max_norm=float("inf"))
        self.finite = self.finite and bool(
            state.flight.finite
        )  # waits for a device: so does who evaluates again
        return state

    # -- an evaluation in the middle of the step that is not finite --------------------------------------------------

    def keep(self, state: TrainState) -> None:
        """Keep what the optimizer is about to change; torch copies a tensor when it is written to."""
        tensors = state.tensors
        leaves = {
            name: lazy_clone(leaf) for name, leaf in zip(state.machine.trainable, tensors.leaves, strict=True)
        }
        slots, beside = map_tensors(lazy_clone, tensors.slots), map_tensors(lazy_clone, tensors.beside)
        self._kept = tensors.replace(params=leaves, slots=slots, beside=beside)
        self._kept_hyper = tuple(map_tensors(lazy_clone, group) for group in state.hyper)

    def spoiled(self, tensors: TensorValues) -> bool:
        """Whether values that are not finite came into the parameters or slots; a line search may have come back."""
        if self.finite:
            return False
        held = [*tensors.leaves, *(leaf for _, leaf in named_leaves(tensors.slots))]
        return not all(bool(torch.isfinite(t).all()) for t in held if isinstance(t, torch.Tensor))

    def undo(self, state: TrainState) -> tuple[Any, Any, Any]:
        """Bring back the parameters; the slots that were kept, what was kept besides, and the hyperparameters."""
        kept: Any = self._kept
        with torch.no_grad():
            for leaf, value in zip(state.tensors.leaves, kept.params.values(), strict=True):
                leaf.copy_(value)
        for name, slot in state.tensors.slots.items():  # the optimizer looks into these dictionaries
            slot.clear()
            slot.update(kept.slots[name])
        return state.tensors.slots, kept.beside, self._kept_hyper
