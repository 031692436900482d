"""Ranks: the processes that take one step together."""

import os
from datetime import timedelta
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from steploop.core.rank_meeting import meet
from steploop.core.validators import require_int
from steploop.errors import ConfigError

__all__ = ["Ranks"]


_TO_START_S = 60.0  # ranks are given at least: machines start at their own speed


@attrs.frozen(kw_only=True)
class Ranks:
    """The processes that train one state together, each with its own parts of every batch.

    A global batch is cut into ``parts``, and each of ``size`` processes computes an equal number of them. Whatever is
    summed over parts is summed by one fixed binary tree: with the same parts, the number of processes changes no bit.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are; it divides ``parts``.
        parts: how many parts a global batch has.
        exact: whether sums over parts are independent of ``size``. False overlaps communication with the backward pass
            and sums in whatever order is quickest: the same ``size`` gives the same bits, another one others.
        group: the process group of torch.distributed; None is the default one.

    Example:
        >>> Ranks.here(parts=4)
        Ranks(rank=0, size=1, parts=4, exact=True)
        >>> Ranks(rank=1, size=2, parts=4).mine
        range(2, 4)
    """

    rank: int = 0
    size: int = 1
    parts: int = 1
    exact: bool = True
    group: Any = attrs.field(default=None, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Every process has the same number of parts."""
        require_int("Ranks: size", self.size, minimum=1)
        require_int("Ranks: rank", self.rank, minimum=0, maximum=self.size - 1)
        require_int("Ranks: parts", self.parts, minimum=1)
        if self.parts % self.size:
            raise ConfigError(
                f"Ranks: {self.parts} parts cannot be shared equally by {self.size} ranks. Take a number of ranks that divides "
                "the number of parts."
            )

    @classmethod
    def here(cls, parts: int | None = None, *, exact: bool = True, timeout_s: float = 600.0) -> Self:
        """Find the ranks that this process is one of: those that ``torchrun`` started, or this process alone.

        Joins the default process group if nobody has: gloo for CPUs, and NCCL for GPUs where there are some, of which the
        process takes the one with its local rank.

        Args:
            parts: of every global batch; None means one for each process.
            exact: see ``Ranks``.
            timeout_s: how long a process waits for the others before it gives up.

        Raises:
            ConfigError: the number of processes does not divide ``parts``.
        """
        rank, size = _joined() or (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        ranks = cls(rank=rank, size=size, parts=size if parts is None else parts, exact=exact)
        if size > 1 and _joined() is None:
            _join(timeout_s)
        return ranks

    @property
    def mine(self) -> range:
        """The numbers of this process's parts."""
        share = self.parts // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    # -- what processes tell each other: every one of them makes the same calls, in the same order --------------------

    def gather_objects(self, value: Any) -> list[Any]:
        """The value that each process has, in the order of the ranks; anything that can be pickled, and small."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def gather_on_first(self, value: Any) -> list[Any]:
        """The value that each process has, on rank 0; nothing on the others. It may be large."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, found, group=self.group, group_dst=0)
        return found or []

    def gather_tensors(self, tensor: Tensor) -> Tensor:
        """Stack the tensor of each process, (size, *shape), in the order of the ranks; they have one shape, and few numbers."""
        if self.size == 1:
            return tensor[None]
        from torch import distributed

        found = tensor.new_empty((self.size, *tensor.shape))
        if tensor.device.type != "cpu":
            distributed.all_gather(list(found), tensor.contiguous(), group=self.group)
            return found
        # for the few numbers that this is for, gloo needs half the time of its own gathering
        copies = tensor.expand(found.shape).contiguous()
        distributed.all_to_all_single(found, copies, group=self.group)
        return found

    def broadcast_object(self, value: Any, *, source: int = 0) -> Any:
        """The value that the process ``source`` has; anything that can be pickled, and small."""
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, group_src=source, group=self.group)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier(group=self.group)


def _joined() -> tuple[int, int] | None:
    """Rank and number of ranks in the default process group, if there is one."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _join(timeout_s: float) -> None:
    from torch import distributed
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # torch does not list them

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, which outlives the ranks
        name = meet(PrefixStore("steploop", store), rank, size, max(timeout_s, _TO_START_S))
        store = PrefixStore(f"steploop/{name}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
