"""Laws of data order: an epoch visits each sample once, in an order made from (seed, epoch)."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Protocol

from steploop.data.order import batch_indices, batches_per_epoch, epoch_order
from steploop.testing.state_comparison import copied, require, require_same

__all__ = [
    "EpochBatches",
    "check_batches_do_not_depend_on_workers",
    "check_cursor_continues_the_epoch",
    "check_epoch_is_a_permutation",
    "check_ranks_partition_the_epoch",
    "first_batches",
]


class EpochBatches(Protocol):
    """Batches of epochs, such as a ``steploop.data.Loader``."""

    def epoch(self, epoch: int, start: int = 0) -> Any:
        """Return the batches of an epoch from number ``start`` on."""
        ...


def check_epoch_is_a_permutation(n: int, *, seed: int, epoch: int, shuffle: bool = True) -> None:
    """Law 15. The order of an epoch is a permutation of 0 .. n - 1, the same at every call.

    Example:
        >>> check_epoch_is_a_permutation(10, seed=0, epoch=3)
    """
    order = epoch_order(n, seed=seed, epoch=epoch, shuffle=shuffle)
    require(
        sorted(order.tolist()) == list(range(n)),
        f"epoch {epoch} must visit each of {n} samples once, but its order is {order.tolist()}",
    )
    again = epoch_order(n, seed=seed, epoch=epoch, shuffle=shuffle)
    require_same(again, order, f"the order of epoch {epoch} must be a function of (seed, epoch)")


def check_ranks_partition_the_epoch(
    n: int, *, seed: int, epoch: int, batch_size: int, world_size: int, drop_last: bool
) -> None:
    """Law 15. The ranks' shares are disjoint, equally long, and together the whole epoch.

    With drop_last the samples of the incomplete global batch are missing, fewer than batch_size * world_size; an epoch
    of fewer samples than ranks has no batch at all.

    Example:
        >>> check_ranks_partition_the_epoch(10, seed=0, epoch=3, batch_size=2, world_size=2, drop_last=True)
    """
    order = epoch_order(n, seed=seed, epoch=epoch)
    count = batches_per_epoch(n, batch_size=batch_size, drop_last=drop_last, world_size=world_size)
    shares = [
        [
            index
            for batch in range(count)
            for index in batch_indices(
                order, batch, batch_size=batch_size, drop_last=drop_last, rank=rank, world_size=world_size
            ).tolist()
        ]
        for rank in range(world_size)
    ]
    seen = [index for share in shares for index in share]
    require(
        len(set(seen)) == len(seen),
        f"no sample may be seen by two ranks or twice, but the shares are {shares}",
    )
    group = batch_size * world_size
    expected = n - n % group if drop_last else (n if count else 0)
    require(len(seen) == expected, f"the ranks must see {expected} of {n} samples, but saw {len(seen)}")
    require(drop_last or count or n < world_size, f"{n} samples must give {world_size} ranks a batch each")
    require(set(seen) <= set(range(n)), f"the ranks must see samples of the epoch, but saw {seen}")


def first_batches(
    batches: EpochBatches, epoch: int, start: int = 0, *, limit: int | None = None
) -> list[Any]:
    """Copy the batches of an epoch from ``start`` on, at most ``limit`` of them."""
    iterator = batches.epoch(epoch, start)
    found = [copied(batch) for batch in islice(iterator, limit)]
    if callable(close := getattr(iterator, "close", None)):
        close()
    return found


def check_cursor_continues_the_epoch(
    batches: EpochBatches, epoch: int, cut: int, *, limit: int | None = None
) -> None:
    """Law 15. epoch(e, cut) = epoch(e)[cut:]: a cursor continues exactly, without replaying.

    Args:
        batches: to be read twice.
        epoch: e.
        cut: how many batches lie behind.
        limit: how many batches to look at; all of them unless given.

    Example:
        >>> check_cursor_continues_the_epoch(loader, epoch=1, cut=2)
    """
    whole = first_batches(batches, epoch, limit=limit)
    rest = first_batches(batches, epoch, cut, limit=None if limit is None else limit - cut)
    require_same(rest, whole[cut:], f"epoch {epoch} from batch {cut} on must be the rest of the epoch")


def check_batches_do_not_depend_on_workers(
    make_batches: Callable[[int], EpochBatches],
    *,
    workers: Sequence[int] = (0, 1, 2),
    epochs: Sequence[int] = (0, 1),
    limit: int | None = None,
) -> None:
    """Law 15. The batches are the same, bit for bit, for any number of worker processes.

    Args:
        make_batches: number of workers -> the batches.
        workers: the numbers to compare.
        epochs: which epochs.
        limit: how many batches of each to look at; all of them unless given.

    Example:
        >>> check_batches_do_not_depend_on_workers(
        ...     lambda count: Loader([(i, i) for i in range(6)], batch_size=2, seed=0, num_workers=count), workers=(0, 1)
        ... )
    """
    for epoch in epochs:
        expected = first_batches(make_batches(workers[0]), epoch, limit=limit)
        for number in workers[1:]:
            law = f"the batches of epoch {epoch} with {number} workers must equal those with {workers[0]}"
            require_same(first_batches(make_batches(number), epoch, limit=limit), expected, law)
