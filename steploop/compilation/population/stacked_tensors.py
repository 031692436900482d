"""Stack the tensors of states along a new first axis, and give every state its part of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.leaves import Place, name_of, places, plain_leaves, with_tensors
from steploop.core.state.copying import leaf_like
from steploop.core.state.ownership import Lease
from steploop.core.state.train_state import TrainState
from steploop.errors import ConfigError

__all__ = ["check_alike", "parts_of", "stacked", "stacked_from"]


def check_alike(states: Sequence[Any]) -> bool:
    """Check that states can be members of one population; whether they can be stacked now.

    They cannot yet where some have made their optimizer's slots and others have not.

    Raises:
        ConfigError: says what of which member differs from the first.
    """
    if not states:
        raise ConfigError("stack: a population has at least one state, but got none.")
    for index, state in enumerate(states):
        if not isinstance(state, TrainState):
            raise ConfigError(
                f"stack: expected train states, but member {index} is a {type(state).__name__}. A population is made of single "
                "states, not of mappings."
            )
        state.check_alive("stack")
        if state.flight.graph is not None or state.flight.grads is not None:
            raise ConfigError(
                f"stack: member {index} is in the middle of a step. Stack what a train step has returned."
            )
    first = states[0]
    alike = True
    for index, state in enumerate(states[1:], 1):
        for what, mine, theirs in zip(_FACTS, _facts(first), _facts(state), strict=True):
            if mine != theirs:
                raise ConfigError(
                    f"stack: the {what} of member {index} is {theirs!r}, but {mine!r} of member 0. Members of a population differ "
                    "in values and numbers only."
                )
        alike &= _same_tensors(first, state, index)
    return alike


_FACTS = (
    "class", "precision", "device", "optimizer", "parameters of each group", "hyperparameters of each group", "trained parameters",
    "rule of the loss scale",
)  # fmt: skip


def _facts(state: TrainState) -> tuple[Any, ...]:
    scale = state.scale
    return (
        type(state).__name__, state.precision, str(state.device), state.machine.optimizer_name, state.machine.group_names,
        tuple(tuple(group) for group in state.hyper), state.machine.trainable,
        None if scale is None else (scale.growth_factor, scale.backoff_factor, scale.growth_interval, scale.floor),
    )  # fmt: skip


def _same_tensors(first: TrainState, other: TrainState, index: int) -> bool:
    mine = {place: (tuple(t.shape), t.dtype, t.stride(), t.requires_grad) for place, t in places(first)}
    theirs = {place: (tuple(t.shape), t.dtype, t.stride(), t.requires_grad) for place, t in places(other)}
    plain = [(p, v) for one in (first, other) for p, v in plain_leaves(one).items()]
    unequal = [
        place for place, value in plain if plain_leaves(first).get(place) != plain_leaves(other).get(place)
    ]
    if unequal:
        raise ConfigError(
            f"stack: {name_of(unequal[0])} is {plain_leaves(other).get(unequal[0])!r} in member {index}, but "
            f"{plain_leaves(first).get(unequal[0])!r} in member 0. Keep what differs as a tensor."
        )
    if mine == theirs:
        return True
    for place in [*mine, *theirs]:
        if mine.get(place) == theirs.get(place) or (place[0] == "slots" and not _both(place, mine, theirs)):
            continue
        if place not in mine or place not in theirs:
            has, lacks = (0, index) if place in mine else (index, 0)
            raise ConfigError(f"stack: member {has} has {name_of(place)}, and member {lacks} has not.")
        raise ConfigError(
            f"stack: {name_of(place)} of member {index} is {_shown(theirs[place])}, but {_shown(mine[place])} in member 0. Members "
            "of a population have one shape: train others apart."
        )
    return False


def _both(place: Place, mine: Mapping[Place, Any], theirs: Mapping[Place, Any]) -> bool:
    """Whether both states have slots for the parameter of this place: one that has not stepped has none yet."""

    def has(known: Mapping[Place, Any]) -> bool:
        return any(p[0] == "slots" and p[1][0] == place[1][0] for p in known)

    return has(mine) and has(theirs)


def _shown(fact: tuple[Any, ...]) -> str:
    shape, dtype, stride, trained = fact
    return f"{shape} {str(dtype).removeprefix('torch.')}, strides {stride}, {'trained' if trained else 'not trained'}"


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack copies of tensors along a new first axis; each part keeps its strides."""
    first = tensors[0]
    step = 1 + sum((size - 1) * stride for size, stride in zip(first.shape, first.stride(), strict=True))
    new = torch.empty_strided(
        (len(tensors), *first.shape),
        (max(step, 1), *first.stride()),
        dtype=first.dtype,
        device=first.device,
    )
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            new[index].copy_(tensor)
    return new


def stacked_from(states: Sequence[TrainState]) -> dict[Place, Tensor]:
    """Every tensor of the states, stacked, under its place."""
    found = [dict(places(state)) for state in states]
    return {place: stacked([tensors[place] for tensors in found]) for place in found[0]}


def parts_of(
    states: Sequence[TrainState], tensors: Mapping[Place, Tensor], *, only: bool = False
) -> tuple[TrainState, ...]:
    """States whose tensors are their parts of stacked ones.

    Args:
        states: the members.
        tensors: place -> stacked tensor.
        only: whether other places than these keep their tensors; else all have to be there.
    """
    parts = {place: tensor.detach().unbind(0) for place, tensor in tensors.items()}
    found = []
    for index, state in enumerate(states):
        own = {place: each[index] for place, each in parts.items()}
        params = state.tensors.params
        own |= {
            place: leaf_like(params[place[1][0]], part) for place, part in own.items() if place[0] == "params"
        }
        found.append(
            state.replace(
                tensors=with_tensors(state, own, same_params=only and not any(p[0] == "params" for p in own)),
                lease=Lease(),
                generation=0,
            )
        )
    return tuple(found)
