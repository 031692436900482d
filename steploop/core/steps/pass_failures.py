"""Failures of forward and backward passes that torch's text does not explain, in words of ours."""

from typing import Any

from torch import nn

from steploop.core.state.machine import Machine
from steploop.core.trees import shapes
from steploop.errors import ObjectiveError, OutOfMemoryError, SteploopError

__all__ = ["did_not_fit", "translated"]

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't allocate memory")


def did_not_fit(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    text = str(error)
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def translated(error: Exception, machine: Machine, batch: Any) -> SteploopError | None:
    """Our error for the two failures of a forward or backward pass that torch's text does not explain; else None.

    ``batch`` is None where it is not known, in a backward pass.
    """
    text = str(error)
    if did_not_fit(error):
        held = "" if batch is None else f": the batch holds {shapes(batch)}"
        return OutOfMemoryError(
            f"A step did not fit into the memory of {machine.device}{held}. The state is as it was. Use smaller batches, "
            "accumulate(state, micro_batches, objective), or precision='bf16'."
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return ObjectiveError(
            f"{_failing_layer(error, machine.model)} needs more than one value per channel in training, but the batch holds "
            f"{shapes(batch)}. Drop the short last batch (drop_last=True) or use larger batches."
        )
    return None


def _failing_layer(error: Exception, model: nn.Module) -> str:
    """The name of the innermost module of ``model`` that the traceback passes through."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "A BatchNorm layer", error.__traceback__
    while trace is not None:
        layer = trace.tb_frame.f_locals.get("self")
        if id(layer) in names and layer is not model:
            found = f"The layer {names[id(layer)]} ({type(layer).__name__})"
        trace = trace.tb_next
    return found
