"""Make one batch from a request, in a worker process or in this one, with the same result.

A request says everything that a batch depends on, so that it does not matter who serves it, or after what.
Errors travel back as values: an exception that crosses a process loses its type, or cannot be built again.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate, get_worker_info

from steploop.core.ambient_generators import ambient_kept, generators_of, seed_ambient
from steploop.core.seeds import fold_in
from steploop.core.trees import map_tensors
from steploop.data.accepted import is_tensors
from steploop.data.order import AMBIENT, SAMPLE, batch_indices
from steploop.data.worker_start import SentModules
from steploop.errors import DataError

__all__ = [
    "EpochRequests",
    "Failure",
    "Fetcher",
    "MapDataset",
    "PartRequests",
    "Request",
    "Transform",
    "listed",
]

_ON_CPU = generators_of(torch.device("cpu"))  # a sample is made on the CPU

Transform = Callable[[Any, torch.Generator], Any]
"""``(sample, generator) -> sample``; the generator (CPU) is seeded by (seed, epoch, sample index)."""


class MapDataset(Protocol):
    """What torch calls a map-style dataset: samples by index, and a length."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample at ``index``."""

    def __len__(self) -> int:
        """The number of samples."""


@attrs.frozen
class Request:
    """One batch to be made: its place in the run and its samples; of an empty one, a sample that shows its fields."""

    epoch: int
    batch: int
    indices: list[int]
    empty: bool = False


@attrs.frozen
class EpochRequests(Sequence[Request]):
    """The requests of an epoch from a position on, each made when it is looked at.

    Attributes:
        order: the samples of the whole epoch, shape ``(M,)``.
        epoch: its number.
        start: the first batch that is asked for.
        batches: how many the epoch has.
        batch_size: see `batch_indices`, as for the rest.
    """

    order: Tensor
    epoch: int
    start: int
    batches: int
    batch_size: int
    drop_last: bool
    rank: int
    world_size: int

    def __len__(self) -> int:
        return self.batches - self.start

    def __getitem__(self, n: Any) -> Any:
        if not 0 <= n < len(self):
            raise IndexError(n)
        rows = batch_indices(
            self.order,
            self.start + n,
            batch_size=self.batch_size,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
        )
        return Request(epoch=self.epoch, batch=self.start + n, indices=rows.tolist())


@attrs.frozen
class PartRequests(Sequence[Request]):
    """The requests of an epoch, each cut into those for the parts of one rank, part after part.

    Attributes:
        whole: the requests for whole batches.
        mine: the numbers of the rank's parts.
        total: how many parts a batch has.
    """

    whole: EpochRequests
    mine: range
    total: int

    def __len__(self) -> int:
        return len(self.whole) * len(self.mine)

    def __getitem__(self, n: Any) -> Any:
        if not 0 <= n < len(self):
            raise IndexError(n)
        batch, at = divmod(n, len(self.mine))
        request: Request = self.whole[batch]
        samples, part = len(request.indices), self.mine[at]
        first, end = part * samples // self.total, (part + 1) * samples // self.total
        if first == end:  # a part of a short last batch may have no samples
            return attrs.evolve(request, indices=request.indices[:1], empty=True)
        return attrs.evolve(request, indices=request.indices[first:end])


@attrs.frozen
class Failure:
    """What a request gives when the dataset, the transform or the collation raised."""

    worker: int | None
    indices: list[int]
    cause: str
    stack: str
    error: Exception | None  # in this process only: it need not survive pickling
    collating: bool = False

    def raise_error(self, num_samples: int, batch: int) -> None:
        """Raise what went wrong as a DataError.

        Raises:
            DataError: always.
        """
        where = "" if self.worker is None else f" in worker {self.worker}"
        hint = "look at that sample, or catch the error in the dataset"
        if self.collating:
            hint = "samples of different shapes, or of types that torch's default_collate lacks, need collate=..."
        elif self.cause.startswith("IndexError"):
            hint = f"the dataset's __len__ says {num_samples}: it must not say more than there are"
        message = f"making batch {batch} failed at {listed(self.indices)}{where}: {self.cause}; {hint}"
        error = DataError(message)
        if self.error is None:  # otherwise the chained exception shows it
            error.add_note(f"In the worker:\n{self.stack}")
        raise error from self.error


def listed(indices: list[int]) -> str:
    """``sample 3``, or ``samples [3, 5]``, and of many the first ones, for messages."""
    if len(indices) == 1:
        return f"sample {indices[0]}"
    shown = ", ".join(map(str, indices[:16]))
    return f"samples [{shown}{f', ... {len(indices)} in all' if len(indices) > 16 else ''}]"


class Fetcher(Dataset[Any]):
    """A dataset of batches, indexed by requests; torch's DataLoader carries it into its workers.

    Where the data are tensors and nothing is done to single samples, a batch is an ``index_select`` of each.
    Otherwise each sample is fetched with the global generators (CPU) seeded by (seed, epoch, sample index), so
    that a dataset which draws from them, as torchvision's transforms do, is reproducible as it is. In the
    training process their states are put back afterwards.

    Args:
        data: tensors with a common first axis (a tensor, or a tree of them), or a map-style dataset.
        seed: the run's seed.
        transform: applied to each sample.
        collate: makes a batch of a list of samples; torch's ``default_collate`` unless given.
    """

    def __init__(
        self, data: Any, *, seed: int, transform: Transform | None, collate: Callable[[list[Any]], Any] | None
    ) -> None:
        self._data = data
        self._seed = seed
        self._transform = transform
        self._collate = collate or default_collate
        self._whole = is_tensors(data) and transform is None and collate is None
        self._generator = torch.Generator()

    @property
    def parts(self) -> dict[str, Any]:
        """What the caller gave, by the name of the argument."""
        return {"dataset": self._data, "transform": self._transform, "collate": self._collate}

    def __getstate__(self) -> dict[str, Any]:
        # first of all, for the classes of what follows may be defined in them
        return {"_modules": SentModules(), **self.__dict__}

    def __getitem__(self, request: Request) -> Any:
        info = get_worker_info()
        at, collating = request.indices, False
        try:
            if self._whole:
                rows = torch.tensor(at)
                return map_tensors(
                    lambda t: t.index_select(0, rows.to(t.device, non_blocking=True)), self._data
                )
            # only this process uses a worker's generators: there is nothing to restore
            with ambient_kept(_ON_CPU) if info is None else nullcontext():
                samples: list[Any] = []
                if _fetches_many(self._data):
                    seed_ambient(fold_in(self._seed, AMBIENT, request.epoch, at[0]), _ON_CPU)
                    samples = [self._transformed(s, request.epoch, i) for s, i in self._many(request.indices)]
                else:
                    for index in request.indices:
                        at = [index]
                        seed_ambient(fold_in(self._seed, AMBIENT, request.epoch, index), _ON_CPU)
                        samples.append(self._transformed(self._sample(index), request.epoch, index))
                at, collating = request.indices, True
                return self._collate(samples)
        except Exception as error:  # noqa: BLE001  (a StopIteration from a dataset must not end the epoch either)
            return Failure(
                worker=None if info is None else info.id,
                indices=at,
                cause=f"{type(error).__name__}: {error}".removesuffix(": "),
                stack=traceback.format_exc(),
                error=error if info is None else None,
                collating=collating,
            )

    def _many(self, indices: list[int]) -> Iterator[tuple[Any, int]]:
        return zip(self._data.__getitems__(indices), indices, strict=True)

    def _sample(self, index: int) -> Any:
        return map_tensors(lambda t: t[index], self._data) if is_tensors(self._data) else self._data[index]

    def _transformed(self, sample: Any, epoch: int, index: int) -> Any:
        if self._transform is None:
            return sample
        return self._transform(sample, self._generator.manual_seed(fold_in(self._seed, SAMPLE, epoch, index)))


def _fetches_many(data: Any) -> bool:
    """Whether a dataset knows torch's protocol for fetching many samples at once, and not only passes it on.

    A ``Subset`` always has the method. Fetched one by one, each sample of it has random numbers of its own.
    """
    while isinstance(data, Subset):
        data = data.dataset
    return hasattr(data, "__getitems__")
