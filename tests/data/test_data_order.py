"""Law 15: the order of the data is a function of (seed, epoch), and positions in it are exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.core.seeds import fold_in
from steploop.data.order import batch_indices, batches_per_epoch, epoch_order
from steploop.errors import ConfigError, DataError

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**64)
epochs = st.integers(0, 1000)
anything = st.integers(-(2**70), 2**70)


def batches(order, **how):
    count = batches_per_epoch(order.numel(), **{k: v for k, v in how.items() if k != "rank"})
    return [batch_indices(order, b, **how).tolist() for b in range(count)]


@given(sizes, seeds, epochs)
def test_each_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(n, seed, epoch):
    order = epoch_order(n, seed=seed, epoch=epoch)
    torch.rand(3)  # what others draw has no part in it
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    assert epoch_order(n, seed=seed, epoch=epoch).equal(order)


@given(st.integers(20, 200), seeds, epochs, st.integers(1, 50))
def test_epochs_and_seeds_differ_in_order(n, seed, epoch, further):
    order = epoch_order(n, seed=seed, epoch=epoch)
    assert not order.equal(epoch_order(n, seed=seed, epoch=epoch + further))
    assert not order.equal(epoch_order(n, seed=seed + further, epoch=epoch))


def test_every_sample_comes_at_every_place_about_equally_often():
    counts = torch.zeros(8, 8)
    for epoch in range(4000):
        counts[torch.arange(8), epoch_order(8, seed=0, epoch=epoch)] += 1
    # 500 are expected, with a standard deviation of 21
    assert counts.min() > 400
    assert counts.max() < 600


def test_the_order_never_changes_between_releases():
    """A checkpoint's cursor is only worth something if the order it points into is still the same."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [4, 1, 5, 6, 2, 7, 3, 0]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [6, 5, 4, 7, 1, 3, 2, 0]
    assert epoch_order(3, seed=0, epoch=1, shuffle=False).tolist() == [0, 1, 2]


@given(sizes, seeds, st.integers(1, 40), st.booleans())
def test_batches_cut_the_order_into_pieces(n, seed, batch_size, drop_last):
    order = epoch_order(n, seed=seed, epoch=0)
    got = batches(order, batch_size=batch_size, drop_last=drop_last)
    kept = n - n % batch_size if drop_last else n
    assert [i for batch in got for i in batch] == order.tolist()[:kept]
    assert all(len(batch) == batch_size for batch in got[:-1])
    assert len(got) == len(range(0, kept, batch_size))


@given(sizes, st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_ranks_partition_the_epoch_in_equally_many_batches(n, batch_size, world_size, drop_last):
    how = {"batch_size": batch_size, "drop_last": drop_last, "world_size": world_size}
    order = epoch_order(n, seed=3, epoch=5)
    ranks = [batches(order, rank=r, **how) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    seen = sorted(i for rank in ranks for batch in rank for i in batch)
    together = batch_size * world_size
    kept = n - n % together if drop_last else n
    assert len(seen) == len(set(seen))
    assert seen == sorted(order[:kept].tolist()) or (n < world_size and not seen)
    assert all(batch for rank in ranks for batch in rank)
    assert all(len(batch) <= batch_size + 1 for rank in ranks for batch in rank)


@given(sizes, st.integers(1, 20), st.integers(1, 5))
def test_global_batches_do_not_depend_on_how_many_processes_share_them(n, batch_size, world_size):
    order = epoch_order(n, seed=3, epoch=5)
    alone = batches(order, batch_size=batch_size * world_size)
    ranks = [batches(order, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    together = [sorted(i for part in parts for i in part) for parts in zip(*ranks, strict=True)]
    # all but the last two: a remainder of fewer samples than processes joins the batch before it
    assert together[:-1] == [sorted(batch) for batch in alone[: max(len(together) - 1, 0)]]


def test_a_remainder_too_small_for_all_ranks_joins_the_batch_before():
    order = torch.arange(10)
    how = {"batch_size": 1, "world_size": 3}
    assert [batches(order, rank=r, **how) for r in range(3)] == [
        [[0], [3], [6, 9]],
        [[1], [4], [7]],
        [[2], [5], [8]],
    ]


def test_an_incomplete_batch_is_kept_unless_told_otherwise():
    assert batches_per_epoch(10, batch_size=4) == 3
    assert batches_per_epoch(10, batch_size=4, drop_last=True) == 2
    assert batch_indices(torch.arange(10), 2, batch_size=4).tolist() == [8, 9]


def test_a_batch_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"batch must be an integer in 0\.\.1, got 2"):
        batch_indices(torch.arange(10), 2, batch_size=4, drop_last=True)
    with pytest.raises(ConfigError, match=r"batch must be an integer in 0\.\.2, got 3"):
        batch_indices(torch.arange(10), 3, batch_size=4)
    with pytest.raises(ConfigError, match=r"epoch must be an integer >= 0, got -1"):
        epoch_order(10, seed=0, epoch=-1)
    with pytest.raises(ConfigError, match=r"n must be an integer >= 0, got True\."):
        epoch_order(n=True, seed=0, epoch=1)


def test_an_order_that_does_not_fit_into_memory_is_a_data_error():
    with pytest.raises(DataError, match=r"order of 1,152,921,504,606,846,975 samples .* make it a Stream"):
        epoch_order(2**60 - 1, seed=0, epoch=0, shuffle=False)


@given(seeds, st.lists(anything, max_size=4), st.integers(0, 3), st.integers(1, 2**64 - 1))
def test_a_folded_seed_changes_with_every_coordinate(seed, coordinates, which, change):
    folded = fold_in(seed, *coordinates)
    assert folded == fold_in(seed, *coordinates)
    assert 0 <= folded < 2**64
    torch.Generator().manual_seed(folded)  # legal as it is
    assert fold_in(seed + change, *coordinates) != folded
    if which < len(coordinates):
        changed = list(coordinates)
        changed[which] += change
        assert fold_in(seed, *changed) != folded
    assert fold_in(seed, *coordinates, 0) != folded


def test_folded_seeds_are_the_same_in_every_release_and_do_not_collide():
    assert fold_in(0) == 9046569608116952042
    assert fold_in(1, 2, 3) == 17317977213102624323
    low = {fold_in(s, e, i) & 0xFFFF_FFFF for s in range(3) for e in range(10) for i in range(100)}
    assert len(low) == 3000  # neighbours differ in the bits that torch's CPU generator uses
