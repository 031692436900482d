"""Let every rank begin with the same state: the tensors of rank 0, and all else compared."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.ranks import Ranks
from steploop.core.state.machine import Machine
from steploop.core.state.parts import TensorValues
from steploop.core.state.sharded import is_sharded
from steploop.core.trees import first_difference
from steploop.errors import ConfigError

__all__ = ["refuse_wrapped", "start_together"]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ConfigError for a module that sums gradients or cuts batches itself: both would be done twice."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, module in model.named_modules():
        if isinstance(module, wrappers):
            raise ConfigError(
                f"TrainState.create: {name or 'the model'} is wrapped in {type(module).__name__}, which sums gradients itself, and "
                "so does a state with ranks. Give it the module inside (model.module)."
            )


def start_together(ranks: Ranks, what: str, machine: Machine, tensors: TensorValues, **plain: Any) -> None:
    """Compare what each rank has made, and overwrite its tensors with those of rank 0.

    Args:
        ranks: that begin together.
        what: the beginning of the message, such as "another state is made".
        machine: that computes.
        tensors: the values; slots are not there yet.
        plain: name -> further small values that have to agree.

    Raises:
        ConfigError: on every rank, if one has made something else than rank 0.
    """
    values = {**tensors.params, **tensors.buffers}
    made = {
        **plain, "ranks": (ranks.size, ranks.parts, ranks.exact),
        "values": {n: (tuple(t.shape), str(t.dtype)) for n, t in values.items()}, "groups": machine.group_names,
        "optimizer": machine.optimizer_name, "carry": tensors.carry, "ema": tensors.ema and list(tensors.ema),
        "extra": tensors.extra,
    }  # fmt: skip
    _check_same(ranks, what, made)
    every = [*values.values(), *(tensors.ema or {}).values()]
    _take_from_first_rank(ranks, [t for t in every if not is_sharded(t)])


def _take_from_first_rank(ranks: Ranks, tensors: Iterable[Tensor]) -> None:
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


def _check_same(ranks: Ranks, what: str, value: Any) -> None:
    """Raise ConfigError on every rank if one has another value than rank 0; for small trees of tensors and plain values."""
    for rank, other in enumerate(found := ranks.gather_objects(value)):
        if (difference := first_difference(other, found[0])) is not None:
            raise ConfigError(
                f"{what} on rank {rank} than on rank 0: {difference}. Every rank runs the same program with the same settings."
            )
