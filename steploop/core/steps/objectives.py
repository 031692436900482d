"""Objectives: what a forward pass is given to compute a loss with, and the forms of what they return."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from steploop.errors import ObjectiveError

__all__ = ["Objective", "read_objective"]

# objective(model, batch) -> loss | (loss, outputs) | (loss, outputs, weight)
Objective = Callable[[nn.Module, Any], Any]


def read_objective(result: Any) -> tuple[Tensor, Any, float | Tensor | None]:
    """(loss, outputs, weight) of what an objective returned; ObjectiveError where it is none of its three forms."""
    loss, outputs, weight = result, None, None
    if isinstance(result, tuple):
        if not 1 <= len(result) <= 3:
            raise ObjectiveError(
                f"An objective returns loss, (loss, outputs) or (loss, outputs, weight), but returned {len(result)} values."
            )
        loss, outputs, weight = (*result, None, None)[:3]
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        came = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ObjectiveError(
            f"An objective's loss must be a floating-point tensor of shape (), but is {came}. Reduce it, as with loss.mean()."
        )
    return loss, outputs, weight
