"""Tensors of which each rank holds a part (DTensor), told apart without importing what makes them."""

import sys
from typing import Any

from torch import Tensor

__all__ = ["as_sharded", "is_sharded", "local_part"]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: a part of it is here, and the rest on other ranks."""
    if type(tensor) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # whoever has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank; of a plain one all of it."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]  # a DTensor
    return part


def as_sharded(whole: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's part out of a tensor that every rank has whole, where ``like`` is sharded."""
    if not is_sharded(like) or is_sharded(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]  # a DTensor
    return distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
