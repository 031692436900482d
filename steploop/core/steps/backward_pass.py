"""One backward pass: what a loss is differentiated with, and the gradients taken off the parameters as values."""

from typing import Any

import torch
from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import translated
from steploop.errors import SpentStateError

try:
    # What torch.autograd.backward calls when it has looked at its arguments. Of a scalar loss and a seed that are ours
    # all of that is known, and it costs 7% of the forward and backward pass of a small perceptron.
    from torch._C import _are_functorch_transforms_active as _transforms_active
    from torch.autograd.graph import _engine_run_backward
except ImportError:  # both are private, and may go: nothing but the time depends on them
    _engine_run_backward: Any = None  # type: ignore[no-redef]

__all__ = ["gradients", "seed_of"]


def seed_of(state: TrainState, loss: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """What ``loss`` is differentiated with: the loss scale times ``weight``, of the loss's dtype and shape ()."""
    factor = weight if state.scale is None else state.scale.scale * weight
    if isinstance(factor, Tensor):
        return factor.to(loss.dtype)
    if type(loss) is not Tensor:  # it is being traced: nothing of the trace may outlive it
        return torch.full((), factor, dtype=loss.dtype, device=loss.device)
    # a tensor a step is 2 us: the factor of the step before is nearly always the same
    seeds = state._machine.seeds
    key = (factor, loss.dtype)
    if key not in seeds:
        seeds.clear()
        seeds[key] = torch.full((), factor, dtype=loss.dtype, device=loss.device)
    return seeds[key]


def gradients(
    state: TrainState, loss: Tensor, seed: Tensor, *, keep: bool = False, take: bool = True
) -> list[Tensor | None]:
    """Run the backward pass and take every ``.grad`` away.

    Args:
        state: whose parameters the loss was computed from.
        loss: shape (), with its graph.
        seed: what it is differentiated with, of its dtype.
        keep: add to the gradients of the pass before, instead of beginning anew.
        take: False leaves them for the next pass to add to, and returns nothing.
    """
    leaves = state._leaves
    if not keep:
        for leaf in leaves:
            if leaf.grad is not None:  # somebody's leftover would be added to ours
                leaf.grad = None
    try:
        _backward(loss, seed)
    except (RuntimeError, MemoryError) as error:
        for leaf in leaves:
            leaf.grad = None
        if "backward through the graph a second time" in str(error):
            raise SpentStateError(
                "backward_scaled: the graph of this loss was used up by another backward pass. Call forward_loss again."
            ) from error
        if (ours := translated(error, state._machine, None)) is None:
            raise
        raise ours from error
    if not take:
        return []
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


def _backward(loss: Tensor, seed: Tensor) -> None:
    """``torch.autograd.backward(loss, seed)``; of a traced loss, and under torch.func, where that is an error, itself."""
    if type(loss) is not Tensor or _engine_run_backward is None or _transforms_active():
        torch.autograd.backward(loss, seed)
    else:
        _engine_run_backward((loss,), (seed,), keep_graph=False, create_graph=False, accumulate_grad=True)
