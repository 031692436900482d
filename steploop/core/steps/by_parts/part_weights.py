"""Weights of the parts of a batch: checked, and the sum of what they weigh."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.core.trees import UNCOUNTED
from steploop.errors import ObjectiveError

__all__ = ["checked_weight", "counts", "weighted_sum"]


def checked_weight(weight: Any, by: str) -> Any:
    """A weight as a float; itself where it is being traced and has no value. Reads a weight that is a tensor.

    Args:
        weight: of the objective, or the number of samples; None where they cannot be counted.
        by: the function that messages name.

    Raises:
        ObjectiveError: it is None, negative, nan, infinite, or a tensor of another shape than ().
    """
    if weight is None:
        raise ObjectiveError(f"{by}: {UNCOUNTED}")
    if isinstance(weight, Tensor) and (weight.dim() or type(weight) is not Tensor):
        if weight.dim():
            raise ObjectiveError(
                f"{by}: a weight must be a number or a tensor of shape (), but is one of {tuple(weight.shape)}."
            )
        return weight
    value = float(weight)
    if not 0.0 <= value < math.inf:
        raise ObjectiveError(
            f"{by}: a weight must be a finite number >= 0, but the objective gave {value!r}."
        )
    return value


def counts(weight: Any) -> bool:
    """Whether a part counts; a weight that is being traced has no value, and its part does."""
    return type(weight) is not float or weight > 0.0


def weighted_sum(values: Tensor, weights: Sequence[Any]) -> Tensor:
    """Sum ``weight * value``, shape (); a part of weight 0 counts for nothing, even where its mean is nan."""
    if any(isinstance(weight, Tensor) for weight in weights):
        factors = torch.stack([torch.as_tensor(w, dtype=values.dtype, device=values.device) for w in weights])
    else:
        factors = torch.tensor(weights, dtype=values.dtype, device=values.device)
    return torch.where(factors == 0, torch.zeros_like(values), values * factors).sum()
