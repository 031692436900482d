"""Decide which samples make up a batch, as pure functions of (seed, epoch).

Nothing here has a memory. The order of an epoch is computed when the epoch begins, from the seed and the
epoch's number alone, and a batch is a slice of it: any cursor can be gone to at once, and every process of a
distributed run computes the same order and takes its own share.
"""

import torch
from torch import Tensor

from steploop.core.seeds import fold_in
from steploop.core.validators import require_int
from steploop.errors import DataError

__all__ = ["batch_indices", "batches_per_epoch", "epoch_order"]

# What the random numbers are for. As the first coordinate of fold_in it keeps the streams apart: the order of
# epoch 3 has nothing to do with the augmentation of sample 3, nor with a step's dropout.
ORDER, SAMPLE, BATCH, AMBIENT, WORKERS = 0x0DA7_A001, 0x0DA7_A002, 0x0DA7_A003, 0x0DA7_A004, 0x0DA7_A005


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool = True) -> Tensor:
    """Return the order in which an epoch visits ``n`` samples.

    A permutation of ``0 .. n - 1``, drawn uniformly by a generator seeded with ``fold_in(seed, ORDER, epoch)``;
    without ``shuffle`` the identity. The same arguments give the same order, always; the ambient random number
    generators have no part in it.

    Args:
        n: number of samples, at least 0.
        seed: the run's seed.
        epoch: the epoch's number, from 0.
        shuffle: whether to permute at all.

    Returns:
        Indices, shape ``(n,)``, int64, on the CPU.

    Raises:
        ConfigError: ``n`` or ``epoch`` is negative or no integer.
        DataError: the order of so many samples does not fit into memory.

    Example:
        >>> epoch_order(5, seed=0, epoch=0, shuffle=False)
        tensor([0, 1, 2, 3, 4])
        >>> torch.equal(epoch_order(5, seed=0, epoch=1), epoch_order(5, seed=0, epoch=1))
        True
    """
    require_int("n", n, minimum=0)
    require_int("epoch", epoch, minimum=0)
    try:
        if not shuffle:
            return torch.arange(n)
        return torch.randperm(n, generator=torch.Generator().manual_seed(fold_in(seed, ORDER, epoch)))
    except RuntimeError as error:
        raise DataError(
            f"the order of {n:,} samples takes {8 * n:,} bytes, more than there are: a dataset that is infinite, or "
            "whose __len__ says so, has no permutation; make it a Stream with a length of your choice"
        ) from error


def batches_per_epoch(n: int, *, batch_size: int, drop_last: bool = False, world_size: int = 1) -> int:
    """Count the batches that each process gets from ``n`` samples: the same for every rank.

    With ``G = batch_size * world_size`` samples to a global batch: ``n // G``, and one more for a remainder that
    is kept and has at least a sample for each process.

    Args:
        n: number of samples.
        batch_size: samples in a batch of one process.
        drop_last: whether an incomplete global batch is dropped.
        world_size: number of processes that share the data.

    Example:
        >>> batches_per_epoch(10, batch_size=4), batches_per_epoch(10, batch_size=4, drop_last=True)
        (3, 2)
    """
    full, rest = divmod(n, batch_size * world_size)
    return full + (not drop_last and rest >= world_size)


def batch_indices(
    order: Tensor, batch: int, *, batch_size: int, drop_last: bool = False, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Return the samples of batch number ``batch``, from an epoch's ``order``, for one process.

    Global batch b is ``order[b * G : (b + 1) * G]`` with ``G = batch_size * world_size``, and rank r takes every
    ``world_size``-th of it from the r-th on. Hence the global batches do not depend on how many processes share
    them, no sample is seen twice, and none is lost. A remainder smaller than ``world_size`` could not give every
    process a sample (and a process without a batch hangs the others): it joins the batch before, where it adds
    at most one sample to each process. With ``drop_last`` the remainder is left out instead.

    Args:
        order: indices, shape ``(n,)``, from :func:`epoch_order`.
        batch: the batch's number in the epoch, from 0.
        batch_size: samples in a batch of one process.
        drop_last: whether an incomplete global batch is dropped.
        rank: this process, ``0 .. world_size - 1``.
        world_size: number of processes that share the data.

    Returns:
        Indices, shape ``(B,)``, int64: a view of ``order``.

    Raises:
        ConfigError: the epoch has no such batch.

    Example:
        >>> batch_indices(torch.tensor([3, 0, 2, 1, 4]), 1, batch_size=2)
        tensor([2, 1])
    """
    n = order.numel()
    count = batches_per_epoch(n, batch_size=batch_size, drop_last=drop_last, world_size=world_size)
    require_int("batch", batch, minimum=0, maximum=count - 1)
    size = batch_size * world_size
    stop = n if batch == count - 1 and not drop_last else (batch + 1) * size
    return order[batch * size + rank : stop : world_size]
