"""Bring the parts of a batch, which ranks hold, together on one."""

from typing import Any

from torch import Tensor

from steploop.checkpoint.format.batch_files import decode, encode
from steploop.core.batch_parts import Parts
from steploop.core.ranks import Ranks
from steploop.errors import CheckpointUnsupportedError

__all__ = ["whole_batch"]


def whole_batch(batch: Any, ranks: Ranks) -> Any:
    """The batch with the parts of all ranks, on rank 0; every rank calls this.

    Args:
        batch: of this rank.
        ranks: who has the others.

    Returns:
        On the other ranks, and where a part cannot be stored: ``batch`` itself.
    """
    if ranks.size == 1 or type(batch) is not Parts:
        return batch
    tensors: dict[str, Tensor] = {}
    told = None
    try:
        structures = [encode(part, tensors) for part in batch.batches]
        told = structures, {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    except CheckpointUnsupportedError:
        pass
    heard = ranks.gather_on_first(told)
    if not heard or None in heard:
        return batch
    parts = [decode(structure, found) for structures, found in heard for structure in structures]
    return Parts(parts, range(batch.total), batch.total)
