"""Cut a dataset into batches: in a set order, from any position, with any number of workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch

from steploop.core.batch_parts import Parts, without_samples
from steploop.core.interruption import check_interruption
from steploop.core.ranks import Ranks
from steploop.core.seeds import fold_in
from steploop.core.steps.trial import in_trial
from steploop.core.trees import map_tensors
from steploop.core.validators import boolean, integer, require_int, to_integer
from steploop.data.accepted import accepted, is_tensors
from steploop.data.batch_requests import EpochRequests, Failure, Fetcher, PartRequests, Request, Transform
from steploop.data.dataset_size import count_dataset, on_device
from steploop.data.epochs import EpochBatches, ahead_of_use, as_device, grouped
from steploop.data.order import BATCH, batches_per_epoch, epoch_order
from steploop.data.sampling import Order, checked_order, refuse_foreign_order
from steploop.data.workers import WorkerPool
from steploop.errors import ConfigError, EmptyDataError

__all__ = ["Augment", "Loader"]

Augment = Callable[[Any, torch.Generator], Any]
"""``(batch, generator) -> batch``; the generator (CPU) is seeded by (seed, epoch, batch number, part)."""


@attrs.frozen(kw_only=True, eq=False)
class Loader:
    """Describe the batches of a dataset; ``epoch(epoch, start)`` makes them.

    Which samples a batch holds, and the random numbers of its augmentation, are functions of (seed, epoch,
    position) and nothing else: not of the number of workers, of what was read before, or of torch's global
    random number generators, which a loader never touches.

    Two kinds of data. Arrays in memory (``Loader((images, labels), ...)``) are cut into batches directly; a batch
    has the structure and the dtypes of the data. Any dataset with samples by index is read sample by sample, in this
    process or in workers of a real ``torch.utils.data.DataLoader``, and collated. Random numbers that a dataset
    draws from the global generators of torch, Python and NumPy, as torchvision's transforms do, depend on (seed,
    epoch, sample index) too.

    ======================================================  =====================================
    dataset                                                 batch
    ======================================================  =====================================
    a tensor or NumPy array ``(N, ...)``                    a tensor ``(B, ...)``
    a tuple, mapping, attrs class or dataclass of those     the same, of tensors ``(B, ...)``
    a pandas DataFrame, an Arrow table                      a dict: column -> tensor ``(B,)``
    a Hugging Face ``datasets.Dataset``                     a dict; numbers become tensors
    a list of samples (tuples, dicts, numbers)              what ``collate`` makes of them
    any dataset with ``__len__`` and ``__getitem__``        what ``collate`` makes of its samples
    ======================================================  =====================================

    Anything else is refused: a list of arrays or of lists (unless ``collate`` is given), for it may be samples or
    columns; columns of text, dates or with gaps; paths, iterators and loaders.

    Args:
        dataset: the samples, as in the table.
        batch_size: samples in a batch: in all its parts together, however many ranks share them (see ``in_parts``).
        seed: the run's seed.
        shuffle: whether every epoch has an order of its own; else the order of the dataset.
        order: ``(seed=, epoch=) -> indices`` of the samples to visit, instead of a shuffle: `weighted_order`,
            `bucketed_order` or any other pure function.
        drop_last: whether an incomplete last batch is left out.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: whether batches pass through page-locked memory; by default where ``device`` is CUDA. Without
            CUDA it has no effect.
        persistent_workers: whether workers live on from one epoch to the next; ``close()`` ends them.
        transform: ``(sample, generator) -> sample``, in the worker; its generator is seeded by (seed, epoch,
            sample index).
        augment: ``(batch, generator) -> batch``, in this process, after the transfer to the device; its generator
            (on the CPU, so that every device sees the same numbers) is seeded by (seed, epoch, batch number).
        collate: makes a batch of a list of samples; ``torch.utils.data.default_collate`` unless given.
        device: where the batches go; None leaves them where they are.
        prefetch: batches that each worker makes ahead, and transfers to CUDA in flight.
        rank: this process among those that share the data in a loop without `Ranks`, as around
            ``DistributedDataParallel``. There, ``batch_size`` is that of one process.
        world_size: number of those processes. Every one gets as many batches as every other.

    Raises:
        ConfigError: an argument is not legal.
        EmptyDataError: there is not a single batch.
        DataError: the dataset is none: says what to give instead.

    Example:
        >>> loader = Loader((torch.randn(10, 4), torch.arange(10)), batch_size=4, seed=0)
        >>> [len(labels) for _, labels in loader.epoch(0)]
        [4, 4, 2]
        >>> rest = loader.epoch(0, start=2)  # the same epoch, from its third batch on
    """

    dataset: Any = attrs.field(kw_only=False, repr=lambda data: type(data).__name__)
    batch_size: int = attrs.field(converter=to_integer, validator=integer(at_least=1))
    seed: int = attrs.field(converter=to_integer, validator=integer(at_least=0))
    shuffle: bool = attrs.field(default=True, validator=boolean())
    order: Order | None = None
    drop_last: bool = attrs.field(default=False, validator=boolean())
    num_workers: int = attrs.field(default=0, converter=to_integer, validator=integer(at_least=0))
    pin_memory: bool | None = attrs.field(default=None, validator=attrs.validators.optional(boolean()))
    persistent_workers: bool = attrs.field(default=False, validator=boolean())
    transform: Transform | None = None
    augment: Augment | None = None
    collate: Callable[[list[Any]], Any] | None = None
    device: torch.device | None = attrs.field(default=None, converter=as_device)
    prefetch: int = attrs.field(default=2, converter=to_integer, validator=integer(at_least=1))
    rank: int = attrs.field(default=0, converter=to_integer, validator=integer(at_least=0))
    world_size: int = attrs.field(default=1, converter=to_integer, validator=integer(at_least=1))
    num_samples: int = attrs.field(init=False)
    samples_per_epoch: int = attrs.field(init=False)
    # The one thing here that is no value: workers that wait for the next epoch. Nothing depends on them but time.
    _kept: list[WorkerPool] = attrs.field(init=False, factory=list, repr=False)

    def __attrs_post_init__(self) -> None:
        require_int("rank", self.rank, minimum=0, maximum=self.world_size - 1)
        object.__setattr__(self, "dataset", accepted(self.dataset, collates=self.collate is not None))
        object.__setattr__(self, "num_samples", count_dataset(self.dataset))
        if self.num_samples == 0:
            raise EmptyDataError("the dataset has no samples: there is nothing to load")
        object.__setattr__(self, "samples_per_epoch", self._samples_per_epoch())
        if len(self) == 0:
            shared = f" for each of {self.world_size} processes" if self.world_size > 1 else ""
            raise EmptyDataError(
                f"{self.samples_per_epoch} samples with batch_size={self.batch_size} and drop_last={self.drop_last} make "
                f"no batch{shared}; lower batch_size, set drop_last=False, or get more data"
            )
        if self.num_workers > 0 and is_tensors(self.dataset) and on_device(self.dataset):
            raise ConfigError(
                f"num_workers={self.num_workers}, but the data lie on the device, where worker processes cannot read "
                "them: set num_workers=0 (nothing is left for workers to do), or keep the data on the CPU"
            )

    def __len__(self) -> int:
        """Batches in an epoch, for this process."""
        return batches_per_epoch(
            self.samples_per_epoch,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            world_size=self.world_size,
        )

    def __iter__(self) -> EpochBatches:
        """The batches of epoch 0, every time: what an evaluation wants."""
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0, *, poll: Callable[[], None] | None = None) -> EpochBatches:
        """The batches of an epoch from number ``start`` on; those before are neither made nor read.

        Args:
            epoch: the epoch's number, from 0.
            start: the first batch, ``0 .. len(self)``; at ``len(self)`` there is none left.
            poll: called about twice a second while workers make us wait; what it raises ends the epoch. By default
                it asks whether the run should stop.

        Returns:
            An iterator of batches that knows its ``position`` and the seconds it ``waited_s``.

        Raises:
            ConfigError: there is no such position.
            DataError: workers could not be started; later, from the iterator: a dataset or a worker failed.
        """
        return EpochBatches(
            *self._started(epoch, start, self._requests(epoch, start), None, poll), start=start
        )

    def in_parts(
        self, ranks: Ranks, epoch: int = 0, start: int = 0, *, poll: Callable[[], None] | None = None
    ) -> EpochBatches:
        """The same batches as ``epoch`` gives, each as the `Parts` of one rank: nothing else is read.

        Part p of P holds the samples ``[p * n // P, (p + 1) * n // P)`` of the n of a batch, and has an augmentation of
        its own, seeded by (seed, epoch, batch number, p). Neither depends on the number of ranks. A part of a last batch of
        fewer than P samples may have none: its tensors have a first axis of length 0 (None where a batch is no tree of tensors).

        Args:
            ranks: whose parts.
            epoch: as for ``epoch``; the rest too.
            start: the first batch.
            poll: called while workers make us wait.

        Raises:
            ConfigError: there is no such position.
            DataError: as from ``epoch``.

        Example:
            >>> loader = Loader(torch.arange(6), batch_size=4, seed=0, shuffle=False)
            >>> [parts.batches for parts in loader.in_parts(Ranks(parts=2))]
            [(tensor([0, 1]), tensor([2, 3])), (tensor([4]), tensor([5]))]
        """
        mine, total = ranks.mine, ranks.parts
        requests = PartRequests(self._requests(epoch, start), mine, total)
        batches, close = self._started(epoch, start, requests, mine, poll)
        parts = (Parts(some, mine, total) for some in grouped(batches, len(mine)))
        return EpochBatches(parts, close, start=start)

    def _started(
        self,
        epoch: int,
        start: int,
        requests: Sequence[Request],
        parts: Sequence[int] | None,
        poll: Callable[[], None] | None,
    ) -> tuple[Iterator[Any], Callable[[], None]]:
        """Begin to make the batches that are asked for, or their parts; also what ends that."""
        numbers = (self.rank,) if parts is None else parts
        pool = self._pool() if self.num_workers > 0 and len(requests) > 0 else None
        if pool is not None:
            pool.begin(requests)
        batches: Iterator[Any] = self._batches(requests, pool, poll)
        # batches with fewer samples than parts: the last one at most, unless all are so small
        small = isinstance(requests, PartRequests) and self.batch_size < requests.total
        short = 0 if small else len(requests) - len(numbers)

        def finish(batch: Any, n: int) -> Any:
            ahead, at = divmod(n, len(numbers))
            made = self._augmented(batch, epoch, start + ahead, numbers[at])
            return without_samples(made, 1) if n >= short and requests[n].empty else made

        if self.device is None:
            batches = (finish(batch, n) for n, batch in enumerate(batches))
        else:
            batches = ahead_of_use(batches, self.device, finish, self.prefetch * len(numbers))
        return batches, lambda: self._release(pool)

    def samples_of(self, epoch: int, batch: int) -> list[int]:
        """The indices of the samples in a batch of an epoch, in their order.

        Raises:
            ConfigError: there is no such batch.
        """
        require_int("epoch", epoch, minimum=0)
        require_int("batch", batch, minimum=0, maximum=len(self) - 1)
        found: list[int] = self._requests(epoch, batch)[0].indices
        return found

    def _requests(self, epoch: int, start: int) -> EpochRequests:
        require_int("epoch", epoch, minimum=0)
        require_int("start", start, minimum=0, maximum=len(self))
        return EpochRequests(
            self._order(epoch, self.samples_per_epoch),
            epoch=epoch,
            start=start,
            # an evaluation with a loop of its own needs one for a trial
            batches=min(start + 1, len(self)) if in_trial() else len(self),
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _samples_per_epoch(self) -> int:
        if self.order is None:
            return self.num_samples
        if not self.shuffle:
            raise ConfigError(
                "shuffle=False and order=... were both given: leave shuffle out, the order decides"
            )
        refuse_foreign_order(
            self.order, num_samples=self.num_samples, batch_size=self.batch_size * self.world_size
        )
        return len(self._order(0, None))

    def _order(self, epoch: int, length: int | None) -> torch.Tensor:
        if self.order is None:
            return epoch_order(self.num_samples, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        return checked_order(
            self.order, seed=self.seed, epoch=epoch, num_samples=self.num_samples, length=length
        )

    def close(self) -> None:
        """End the workers that were kept for the next epoch."""
        while self._kept:
            self._kept.pop().close()

    def _pool(self) -> WorkerPool:
        if self._kept:
            return self._kept.pop()
        return WorkerPool(
            self._fetcher(),
            num_workers=self.num_workers,
            pin_memory=self._pins(),
            prefetch=self.prefetch,
            seed=self.seed,
        )

    def _release(self, pool: WorkerPool | None) -> None:
        """Called once for every epoch: when it is over, or given up."""
        if pool is None:
            return
        if self.persistent_workers and pool.idle and not self._kept:
            self._kept.append(pool)
        else:
            pool.close()

    def _fetcher(self) -> Fetcher:
        return Fetcher(self.dataset, seed=self.seed, transform=self.transform, collate=self.collate)

    def _pins(self) -> bool:
        wanted = (
            self.device is not None and self.device.type == "cuda"
            if self.pin_memory is None
            else self.pin_memory
        )
        return wanted and torch.cuda.is_available()

    def _batches(
        self, requests: Sequence[Request], pool: WorkerPool | None, poll: Callable[[], None] | None
    ) -> Iterator[Any]:
        fetcher = self._fetcher()
        for request in requests:
            batch = fetcher[request] if pool is None else pool.receive(poll or check_interruption)
            if isinstance(batch, Failure):
                batch.raise_error(self.num_samples, request.batch)
            if pool is None and self._pins():
                batch = map_tensors(lambda t: t if t.is_cuda else t.pin_memory(), batch)
            yield batch

    def _augmented(self, batch: Any, epoch: int, number: int, part: int) -> Any:
        if self.augment is None:
            return batch
        generator = torch.Generator().manual_seed(fold_in(self.seed, BATCH, epoch, number, part))
        return self.augment(batch, generator)
