"""Let every rank begin with the same state: the tensors of rank 0, and all else compared."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.ranks import Ranks
from steploop.core.trees import first_difference
from steploop.errors import ConfigError

__all__ = ["check_same", "refuse_wrapped", "take_from_first_rank"]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ConfigError for a module that sums gradients or cuts batches itself: both would be done twice."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise ConfigError(
                f"TrainState.create: {name or 'the model'} is wrapped in {type(module).__name__}, which sums gradients itself, and "
                "so does a state with ranks. Give it the module inside (model.module)."
            )


def take_from_first_rank(ranks: Ranks, tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors with those of rank 0."""
    if ranks.size == 1:
        return
    from torch import distributed

    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            # as bytes: a backend does not send every dtype
            distributed.broadcast(whole.reshape(-1).view(torch.uint8), group_src=0, group=ranks.group)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)


def check_same(ranks: Ranks, what: str, value: Any) -> None:
    """Raise ConfigError on every rank if one has another value than rank 0; for small trees of tensors and plain values."""
    for rank, other in enumerate(found := ranks.gather_objects(value)):
        if (difference := first_difference(other, found[0])) is not None:
            raise ConfigError(
                f"{what} on rank {rank} than on rank 0: {difference}. Every rank runs the same program with the same settings."
            )
