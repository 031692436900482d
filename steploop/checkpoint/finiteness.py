"""Refuse to save a state with a nan or an inf in a trained parameter."""

import cmath
from collections.abc import Mapping

import torch
from torch import Tensor

from steploop.checkpoint.packing import MODEL_FILE, Collected
from steploop.core.state.sharded import local_part
from steploop.errors import NonFiniteError

__all__ = ["refuse_nonfinite"]

# a sum of halves would overflow where none of them does
_SUMMED_AS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def refuse_nonfinite(collected: Collected) -> None:
    """Raise if a trained parameter is not finite; buffers and frozen parameters are not checked.

    Of sharded parameters the parts on this rank are looked at; parameters that are not among the tensors are not.

    Costs one pass at the speed of memory: the sum of finite numbers is finite, unless it overflows, and only where it
    is not are the numbers looked at one by one.

    Raises:
        NonFiniteError: names the first of them.
    """
    table = collected.tensors[MODEL_FILE]
    found = first_nonfinite({name: local_part(table[name]) for name in collected.trained if name in table})
    if found is None:
        return
    name, count = found
    step = next(iter(collected.state["states"].values()))["applied_steps"]
    raise NonFiniteError(
        f"The parameter {name!r} is not finite ({count} of its {table[name].numel()} values), after step {step}. This state "
        "was not saved; the checkpoints before it stand. Its gradients were finite: an update overflowed, so lower the "
        "learning rate, or something else wrote it. checkpoint.save(..., require_finite=False) saves it all the same."
    )


def first_nonfinite(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Name the first tensor with non-finite values and count them; None if there is none."""
    for name, tensor in tensors.items():
        values = tensor.detach()
        if values.element_size() == 1:  # no arithmetic in float8
            values = values.float()
        if cmath.isfinite(values.sum(dtype=_SUMMED_AS.get(values.dtype)).item()):
            continue
        if count := int((~torch.isfinite(values)).sum()):
            return name, count
    return None
