"""Turn a DataLoader, another loader or a list into batches by epoch and position."""

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from steploop.core.ambient_generators import ambient_kept, generators_of, seed_ambient
from steploop.core.batch_parts import split_parts
from steploop.core.ranks import Ranks
from steploop.core.seeds import fold_in
from steploop.data.loader import Loader
from steploop.data.order import AMBIENT, ORDER
from steploop.data.sampling import weighted_order
from steploop.data.stream import Stream
from steploop.errors import ConfigError, DataError, EmptyDataError

__all__ = ["Batches", "as_batches", "epoch_of_parts"]


@runtime_checkable
class Batches(Protocol):
    """Batches by epoch and position; `Loader` and `Stream` are such, and `as_batches` makes them of a DataLoader.

    Example:
        >>> isinstance(Loader(torch.arange(10), batch_size=4, seed=0), Batches)
        True
    """

    def epoch(self, epoch: int, start: int = 0) -> Iterable[Any]:
        """Give the batches of an epoch from number ``start`` on."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...


def as_batches(value: Any, *, seed: int) -> Batches:
    """Turn a DataLoader, another loader or a list of batches into batches by epoch and position.

    A plain ``DataLoader`` over a map-style dataset, with one of torch's own samplers, becomes a `Loader` with its
    settings: the order of an epoch is a function of (seed, epoch), no longer of torch's global generator, and a run can
    go on from any batch. Any other loader is read as it is, in a `Stream`: with its generators seeded by (seed, epoch)
    and ``set_epoch`` called where its sampler has it; a run can go on from the beginning of an epoch only. A list is
    the same batches in every epoch.

    Args:
        value: what makes the batches.
        seed: the run's seed; a ``generator`` of the DataLoader brings its own.

    Returns:
        ``value`` itself if it is `Batches` already.

    Raises:
        ConfigError: it makes no batches; says what to give instead.
        DataError: it does not know how many batches an epoch has.
        EmptyDataError: a list without batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> batches = as_batches(DataLoader(range(10), batch_size=4, shuffle=True), seed=0)
        >>> [len(batch) for batch in batches.epoch(0, start=1)]
        [4, 2]
    """
    if isinstance(value, Batches):
        return value
    if isinstance(value, list):
        if not value:
            raise EmptyDataError("batches is an empty list: there is nothing to train on")
        return Stream(lambda _, start: value[start:], length=len(value), restorable=True)
    iterable = isinstance(value, Iterable) and not isinstance(value, (Iterator, str, bytes, Tensor))
    if isinstance(value, Dataset) or not iterable or hasattr(value, "__getitem__"):
        raise _no_batches(value)
    kind = type(value).__name__
    try:
        length = len(value) if isinstance(value, Sized) else None
    except TypeError:  # a DataLoader of an iterable dataset
        length = None
    if length is None:
        raise DataError(
            f"the {kind} does not know how many batches an epoch has. Say it: Stream(lambda epoch, start: loader, "
            "length=...)"
        )
    loader = _as_loader(value, seed) if type(value) is DataLoader else None
    return loader or Stream(partial(_read, value, seed), length=length)


def epoch_of_parts(batches: Batches, ranks: Ranks | None, epoch: int, start: int) -> Iterable[Any]:
    """The batches of an epoch, each as the parts of one rank; whole ones without ranks.

    Batches that have no ``in_parts`` are read whole by every rank, which keeps its parts.

    Args:
        batches: the batches.
        ranks: whose parts; None: no ranks.
        epoch: the number of the epoch.
        start: its first batch.
    """
    if ranks is None:
        return batches.epoch(epoch, start)
    if (in_parts := getattr(batches, "in_parts", None)) is not None:
        parts: Iterable[Any] = in_parts(ranks, epoch, start)
        return parts
    return (split_parts(batch, ranks) for batch in batches.epoch(epoch, start))


def _no_batches(value: Any) -> ConfigError:
    kind = type(value).__name__
    if isinstance(value, Iterator):
        advice = f"A {kind} is spent after one epoch: Stream(lambda epoch, start: make(), length=...) makes a new one"
    elif isinstance(value, IterableDataset):
        advice = "Give a DataLoader of it, in Stream(lambda epoch, start: loader, length=...)"
    else:
        advice = "Of data make batches with Loader(data, batch_size=..., seed=...)"
    return ConfigError(
        f"batches must be a Loader, a Stream, a DataLoader or a list of batches, got a {kind}. {advice}"
    )


def _as_loader(given: "DataLoader[Any]", seed: int) -> Loader | None:
    """The same settings in a Loader; None where one of them has no counterpart there."""
    order, generator = _order_of(given)
    if (
        order is None
        or type(given.batch_sampler) is not BatchSampler
        or given.batch_size is None
        or given.worker_init_fn is not None
        or given.multiprocessing_context is not None
        or given.timeout > 0
    ):
        return None
    # tensors are cut into batches directly; of other data, batches are made by the function that made them before
    cuts = type(given.dataset) is TensorDataset and given.collate_fn is default_collate
    return Loader(
        given.dataset,
        batch_size=given.batch_size,
        seed=seed if generator is None else generator.initial_seed(),
        drop_last=given.drop_last,
        num_workers=given.num_workers,
        pin_memory=given.pin_memory,
        persistent_workers=given.persistent_workers,
        collate=None if cuts else given.collate_fn,
        prefetch=given.prefetch_factor or 2,
        **order,
    )


def _order_of(given: "DataLoader[Any]") -> tuple[dict[str, Any] | None, torch.Generator | None]:
    """How a Loader says the order of a sampler, and the generator that the user gave."""
    sampler: Any = given.sampler
    generator = getattr(sampler, "generator", None) or given.generator
    if type(sampler) is SequentialSampler:
        return {"shuffle": False}, generator
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return {}, generator
    if type(sampler) is WeightedRandomSampler:
        draw = partial(
            weighted_order, sampler.weights, num_samples=sampler.num_samples, replacement=sampler.replacement
        )
        return {"order": draw}, generator
    return None, generator


def _read(loader: Any, seed: int, epoch: int, start: int) -> Iterator[Any]:  # noqa: ARG001  (Stream's signature)
    """Read another loader from its beginning, every draw from a generator a function of (seed, epoch, batch)."""
    parts = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler", "dataset"))]
    parts.append(getattr(parts[2], "sampler", None))
    for part in parts:
        set_epoch: Callable[[int], None] | None = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(fold_in(seed, ORDER, epoch))
    on_cpu = generators_of(torch.device("cpu"))
    with ambient_kept(on_cpu):
        seed_ambient(fold_in(seed, ORDER, epoch), on_cpu)
        source = iter(loader)
    number = 0
    while True:
        with ambient_kept(on_cpu):
            seed_ambient(fold_in(seed, AMBIENT, epoch, number), on_cpu)
            try:
                batch = next(source)
            except StopIteration:
                return
        yield batch
        number += 1
