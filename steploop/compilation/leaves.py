"""List the tensors of a state in the order of graph inputs, and what else a graph depends on."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from steploop.core.state.parts import TensorValues, field_names
from steploop.core.state.train_state import TrainState
from steploop.core.trees import paths, with_leaves
from steploop.errors import CompileError

__all__ = [
    "Place",
    "constants_of",
    "counted_on_host",
    "name_of",
    "places",
    "plain_leaves",
    "refuse_overlap",
    "signature",
    "tensor_at",
    "with_tensors",
]

# (part of TensorValues, keys and indices that lead to the tensor)
Place = tuple[str, tuple[Any, ...]]


def counted_on_host(state: TrainState) -> bool:
    """Whether the host keeps a state's counters and loss scale, because reading them costs no wait."""
    return state.device.type == "cpu"


def _leaves(state: TrainState) -> Iterator[tuple[Place, Any]]:
    """Every tensor and plain value of the state's tensors under its place, in one order for every like state."""
    tensors = state.tensors
    for field in field_names(type(tensors)):
        tree = getattr(tensors, field)
        if tree is not None:
            yield from (((field, path), leaf) for path, leaf in paths(tree))


def places(state: TrainState) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor that a step may change, under its place, in an order that is the same for every like state."""
    for place, leaf in _leaves(state):
        if place[0] == "slots" and len(place[1]) > 2:
            name, key = place[1][:2]
            kind = type(state.tensors.slots[name][key]).__name__
            raise CompileError(
                f"uses {type(state.machine.optimizer).__name__}, which keeps a {kind} ({key!r}) for {name}, "
                "and a graph cannot update that. Take another optimizer (see help(steploop.compile))."
            )
        if isinstance(leaf, Tensor):
            yield place, leaf


def plain_leaves(state: TrainState) -> dict[Place, Any]:
    """The values in the state's tensors that are none: a graph holds for these only."""
    return {place: leaf for place, leaf in _leaves(state) if not isinstance(leaf, Tensor)}


def name_of(place: Place) -> str:
    """What a message calls a place."""
    field, path = place
    name = ".".join(map(str, path))
    return name if field in {"params", "buffers", "slots"} else f"{field} {name}".strip()


def tensor_at(state: TrainState, place: Place) -> Tensor:
    """The tensor of ``state`` at ``place``."""
    held = getattr(state.tensors, place[0])
    for key in place[1]:
        held = held[key]
    return held  # type: ignore[no-any-return]  # places hold tensors


def with_tensors(
    state: TrainState, tensors: Mapping[Place, Tensor], *, same_params: bool = False
) -> TensorValues:
    """The state's values with other tensors at their places."""
    fields: dict[str, dict[tuple[Any, ...], Tensor]] = {}
    for (field, path), tensor in tensors.items():
        fields.setdefault(field, {})[path] = tensor
    values = state.tensors
    if same_params:
        return values.replace(**{f: with_leaves(getattr(values, f), leaves) for f, leaves in fields.items()})
    # every container is a new one: an optimizer counts in plain numbers there, too
    changes = {
        field: with_leaves(held, fields.get(field, {}))
        for field in field_names(type(values))
        if (held := getattr(values, field)) is not None
    }
    params = changes.get("params", values.params)
    return values.replace(**changes, leaves=tuple(params[name] for name in state.machine.trainable))


def refuse_overlap(state: TrainState) -> None:
    """Raise CompileError if two tensors share memory: a graph would miss the change of one."""
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), name_of(place))
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
        state.machine,
        state.precision,
        None
        if scale is None
        else (scale.growth_factor, scale.backoff_factor, scale.growth_interval, scale.floor),
        tuple(
            (place, tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)
            for place, t in places(state)
        ),
        tuple((place, type(value), value) for place, value in plain_leaves(state).items()),
    )
