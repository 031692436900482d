"""List the tensors of a state in the order of graph inputs, and what else a graph depends on."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError

__all__ = ["Place", "constants_of", "counted_on_host", "places", "refuse_overlap", "signature", "tensor_at"]

# (field, parameter or buffer name, slot name or None)
Place = tuple[str, str, str | None]


def counted_on_host(state: TrainState) -> bool:
    """Whether the host keeps a state's counters and loss scale, because reading them costs no wait."""
    return state.device.type == "cpu"


def places(state: TrainState) -> Iterator[tuple[Place, Tensor]]:
    """Map places to the tensors that a step may change, in an order equal for like states."""
    for name, tensor in state._params.items():
        yield ("_params", name, None), tensor
    for name, tensor in state._buffers.items():
        yield ("_buffers", name, None), tensor
    for name, slot in state._slots.items():
        for key, value in slot.items():
            if isinstance(value, Tensor):
                yield ("_slots", name, key), value
            elif isinstance(value, (list, tuple, dict)):
                raise CompileError(
                    f"uses {type(state._machine.optimizer).__name__}, which keeps a {type(value).__name__} ({key!r}) for {name}, "
                    "and a graph cannot update that. Take another optimizer (see help(steploop.compile))."
                )
    for name, tensor in (state._ema or {}).items():
        yield ("_ema", name, None), tensor


def tensor_at(state: TrainState, place: Place) -> Tensor:
    """Return the tensor of ``state`` at ``place``."""
    field, name, key = place
    held = state.__dict__[field][name]
    return held if key is None else held[key]  # type: ignore[no-any-return]  # places hold tensors


def refuse_overlap(state: TrainState) -> None:
    """Raise CompileError if two tensors share memory: a graph would miss the change of one."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), place[1])
        for place, t in places(state)
        if t.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise CompileError(
                f"is given a state whose {first} and {second} share memory. Clone one of them."
            )


def constants_of(hyper: tuple[Mapping[str, Any], ...], *, cycled: bool) -> tuple[Any, ...]:
    """Return the hyperparameters that a graph has built in: all that no schedule sets.

    Args:
        hyper: of each parameter group.
        cycled: whether the schedule sets the momentum too.
    """
    found = []
    for group in hyper:
        kept = {key: value for key, value in group.items() if key != "lr"}
        if cycled and "betas" in kept:
            kept["betas"] = tuple(kept["betas"][1:])
        elif cycled:
            kept.pop("momentum", None)
        found.append(tuple(kept.items()))
    return tuple(found)


def signature(state: TrainState) -> tuple[Any, ...]:
    """Describe a state so that equal descriptions can run the same graph."""
    scale = state.scale
    return (
        state._machine,
        state.precision,
        None
        if scale is None
        else (scale.growth_factor, scale.backoff_factor, scale.growth_interval, scale.floor),
        state._ema is None,
        tuple(
            (place, tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)
            for place, t in places(state)
        ),
        tuple(
            (name, key, value)
            for name, slot in state._slots.items()
            for key, value in slot.items()
            if not isinstance(value, Tensor)
        ),
    )
