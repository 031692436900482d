"""Ranks: the processes that take one step together, and the parts of a batch that each of them computes."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Self

import attrs
import torch
from torch import Tensor

from steploop.core.rank_meeting import meet
from steploop.core.trees import UNCOUNTED, count_samples, map_tensors
from steploop.core.validators import require_int
from steploop.errors import ConfigError, DataError

__all__ = ["Parts", "Ranks", "split_parts", "without_samples"]


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


@attrs.frozen(eq=False)
class Parts:
    """This process's parts of one global batch: ``forward_loss`` and ``accumulate`` take it in a batch's place.

    A part is what the objective takes; None, or one without samples, counts for nothing and is not computed. What a
    step does to a batch before it gives it to ``forward_loss`` it can do to parts: ``parts[key]`` and unpacking give the
    parts of a field, ``parts.chunk(2)`` and other methods act on each part, ``map`` applies any function to each part, and
    fields may be put together again.

    Attributes:
        batches: the parts, in memory of their own: a view into a larger tensor may compute other bits.
        numbers: the number of each among all parts of the global batch.
        total: how many parts the global batch has, over all processes.

    Example:
        >>> x, y = split_parts((torch.arange(4), torch.ones(4)), Ranks.here(parts=2))
        >>> x.batches
        (tensor([0, 1]), tensor([2, 3]))
        >>> x.map(len).batches
        (2, 2)
    """

    batches: tuple[Any, ...] = attrs.field(converter=tuple)
    numbers: range
    total: int

    def map(self, function: Callable[[Any], Any]) -> "Parts":
        """The parts that ``function`` makes of these; None stays None."""
        return self._with([None if batch is None else function(batch) for batch in self.batches])

    def _with(self, batches: Any) -> "Parts":
        return Parts(batches, self.numbers, self.total)

    def __getitem__(self, key: Any) -> "Parts":
        """The parts of a field."""
        return self.map(lambda batch: batch[key])

    def __getattr__(self, name: str) -> "Parts":
        """An attribute of each part, or its method: ``parts.chunk(2)`` is what it gives for each."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.map(lambda batch: getattr(batch, name))

    def __call__(self, *args: Any, **kwargs: Any) -> "Parts":
        """What the method of each part gives."""
        return self.map(lambda method: method(*args, **kwargs))

    def __iter__(self) -> Iterator["Parts"]:
        """The parts of each field; a part that has fewer has None in the place of the others."""
        items = [() if batch is None else tuple(batch) for batch in self.batches]
        longest = max((len(item) for item in items), default=0)
        return iter([self._with([i[k] if k < len(i) else None for i in items]) for k in range(longest)])


def split_parts(batch: Any, ranks: Ranks) -> Parts:
    """Cut a global batch, which every process has, into parts, and copy those of this process.

    With n samples and P parts, part p has the samples p n // P up to (p + 1) n // P, without the last.

    Args:
        batch: a tree of tensors whose first axes are the samples, or a list of samples. What is no tensor and no list of
            as many things goes into every part.
        ranks: which parts to take.

    Raises:
        DataError: the samples cannot be counted.

    Example:
        >>> split_parts(torch.arange(5), Ranks(rank=1, size=2, parts=2)).batches
        (tensor([2, 3, 4]),)
    """
    samples = count_samples(batch)
    if samples is None and type(batch) is list:
        samples = len(batch)
    if samples is None:
        raise DataError(
            f"split_parts: {UNCOUNTED.split(' Return')[0]} Cut it yourself: Parts(batches, ranks.mine, ranks.parts)."
        )
    bounds = [samples * p // ranks.parts for p in range(ranks.parts + 1)]
    cuts = [(bounds[p], bounds[p + 1]) for p in ranks.mine]
    batches: list[Any] = [
        without_samples(batch, samples) if lo == hi else _cut(batch, lo, hi, samples) for lo, hi in cuts
    ]
    return Parts(batches, ranks.mine, ranks.parts)


def without_samples(batch: Any, samples: int) -> Any:
    """What a batch of ``samples`` samples looks like without any, for a part that has none; None where that is not known.

    A step can unpack it: a rank all of whose parts are empty has no other to see the fields in.
    """
    empty = _cut(batch, 0, 0, samples)
    return empty if count_samples(empty) == 0 else None


def _cut(tree: Any, start: int, stop: int, samples: int) -> Any:
    """The samples from ``start`` to ``stop`` of every tensor and list, copied."""
    if type(tree) is list and len(tree) == samples and not all(isinstance(item, Tensor) for item in tree):
        return tree[start:stop]
    if type(tree) is dict:
        return {key: _cut(value, start, stop, samples) for key, value in tree.items()}
    if type(tree) in {list, tuple}:
        return type(tree)(_cut(value, start, stop, samples) for value in tree)
    return map_tensors(lambda t: t[start:stop].clone() if t.dim() else t, tree)
