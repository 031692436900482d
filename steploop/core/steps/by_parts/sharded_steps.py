"""What the steps of a sharded model do otherwise: every rank takes part in every pass, and each has a part of every sum."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.ranks import Ranks
from steploop.core.state.sharded import is_sharded
from steploop.core.state.train_state import TrainState
from steploop.core.steps.clipping import global_norm
from steploop.core.trees import named_leaves
from steploop.errors import ConfigError, EmptyDataError, ObjectiveError

__all__ = [
    "NOT_FOR_SHARDS",
    "check_slots_of_shards",
    "in_rounds",
    "require_weights",
    "sharded_norm",
    "stand_in",
]


# What torch says of an operation that it cannot do on tensors that are cut over ranks.
NOT_FOR_SHARDS = ("Sharding propagation failed", "mixed torch.Tensor and DTensor", "sharding strategy")


def sharded_norm(state: TrainState, parts: list[Tensor]) -> Tensor:
    """The L2 norm of all gradients over all ranks, of which each has parts, with the same bits on each; shape ()."""
    norm = global_norm(parts)
    sharded = state.machine.module.sharded
    if sharded is not None and not sharded.counts:
        norm = torch.zeros_like(norm)  # a replica counts once
    norms = cast("Ranks", state.ranks).gather_tensors(norm)
    return cast("Tensor", torch.linalg.vector_norm(norms))


def stand_in(state: TrainState, micros: Sequence[Parts], empty: Any, by: str) -> Any:
    """A batch for parts without samples: their rank computes it with the others, and counts it for nothing.

    Args:
        state: of a sharded model.
        micros: the parts of each micro-batch.
        empty: whether a part has no samples.
        by: who asks, for messages.

    Returns:
        The batch of the first part of any rank that has samples; None where every part has some.

    Raises:
        EmptyDataError: no part has samples.
        ConfigError: the ranks have other numbers of micro-batches.
    """
    ranks = cast("Ranks", state.ranks)
    told = ranks.gather_objects([[bool(empty(batch)) for batch in parts.batches] for parts in micros])
    if len({len(one) for one in told}) > 1:
        raise ConfigError(
            f"{by}: the ranks have {[len(one) for one in told]} micro-batches, and a sharded model takes every pass on all ranks. Cut "
            "the batch into the same number on each."
        )
    if not any(flag for one in told for flags in one for flag in flags):
        return None
    for rank, one in enumerate(told):
        for index, flags in enumerate(one):
            if not all(flags):
                batch = micros[index].batches[flags.index(False)] if rank == ranks.rank else None
                return ranks.broadcast_object(batch, source=rank)
    raise EmptyDataError(f"{by}: no part of the batch has samples; there is nothing to average over.")


def require_weights(shares: Sequence[Any], ran: Sequence[bool], by: str) -> None:
    """Raise ObjectiveError for a part that has samples and no weight: its loss, 0 / 0, is in the sum already.

    Args:
        shares: the weight of every part of all ranks over that of all parts.
        ran: whether each was run: the others had no samples.
        by: who asks, for messages.
    """
    for number, (share, there) in enumerate(zip(shares, ran, strict=True)):
        if there and share == 0:
            raise ObjectiveError(
                f"{by}: part {number} of the batch has samples but a weight of 0, and the ranks of a sharded model sum their gradients "
                "before anyone can leave it out. Take larger batches, or give it a loss of 0 with a small weight."
            )


def in_rounds(state: TrainState, batches: Iterable[Any]) -> Iterator[tuple[int | None, Any]]:
    """Index and batch of an evaluation by a sharded model, in which every rank takes part in every pass.

    In a last round with fewer batches than ranks, those without one take the first one again, as index None.
    """
    ranks = cast("Ranks", state.ranks)
    numbered = enumerate(batches)
    while chunk := list(islice(numbered, ranks.size)):
        yield from chunk
        if ranks.rank >= len(chunk):
            yield None, chunk[0][1]


def check_slots_of_shards(state: TrainState, slots: dict[str, dict[str, Any]]) -> None:
    """Refuse an optimizer that keeps something of other shape for a sharded parameter than the parameter has.

    Raises:
        ConfigError: names the parameter and the slot.
    """
    for name, slot in slots.items():
        param = state.tensors.params[name]
        for key, value in named_leaves(slot):
            if is_sharded(value) and (value.shape, value.placements) != (param.shape, param.placements):  # type: ignore[attr-defined]
                raise ConfigError(
                    f"optimizer_step: {state.machine.optimizer_name} keeps {key!r} of shape {tuple(value.shape)} for the sharded "
                    f"parameter {name} of shape {tuple(param.shape)}, which a checkpoint could not put together. Take an optimizer "
                    "that keeps a value for each value, such as AdamW or SGD."
                )
