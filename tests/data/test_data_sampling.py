"""Orders by weight and by length: pure functions of (seed, epoch), so that a Loader goes on from any batch."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.data import Loader, bucketed_order, weighted_order
from steploop.errors import ConfigError, DataError
from steploop.tools.check.subjects import smaller

weights = st.lists(st.floats(0, 100), min_size=1, max_size=30).filter(lambda w: sum(x > 0 for x in w) > 0)
lengths = st.lists(st.integers(0, 50), max_size=60)


@given(w=weights, seed=st.integers(0, 2**63), epoch=st.integers(0, 9), count=st.integers(1, 50))
def test_draws_are_a_function_of_seed_and_epoch_and_never_of_weight_zero(w, seed, epoch, count):
    draw = partial(weighted_order, w, num_samples=count)
    rows = draw(seed=seed, epoch=epoch)
    torch.manual_seed(count)  # the ambient generator has no part in it
    assert torch.equal(rows, draw(seed=seed, epoch=epoch))
    assert (rows.dtype, tuple(rows.shape)) == (torch.int64, (count,))
    assert all(w[i] > 0 for i in rows.tolist())


def test_draws_come_as_often_as_their_weights_say():
    w = [0.0, 1.0, 2.0, 5.0, 0.0]
    rows = weighted_order(w, seed=3, epoch=0, num_samples=80_000)
    counts = Counter(rows.tolist())
    for i, weight in enumerate(w):
        expected = weight / 8
        spread = 5 * (expected * (1 - expected) / 80_000) ** 0.5
        assert abs(counts[i] / 80_000 - expected) <= spread
    assert not torch.equal(rows, weighted_order(w, seed=3, epoch=1, num_samples=80_000))


@given(w=weights, seed=st.integers(0, 2**63), data=st.data())
def test_draws_without_replacement_repeat_nothing(w, seed, data):
    count = data.draw(st.integers(1, sum(x > 0 for x in w)))
    rows = weighted_order(w, seed=seed, epoch=2, num_samples=count, replacement=False).tolist()
    assert len(set(rows)) == len(rows) == count
    assert all(w[i] > 0 for i in rows)


def test_draws_without_replacement_are_proportional_among_those_that_are_left():
    """First and second draw against the probabilities of drawing one by one."""
    w, n = [1.0, 2.0, 3.0], 6000
    pairs = Counter(
        tuple(weighted_order(w, seed=0, epoch=e, num_samples=2, replacement=False).tolist()) for e in range(n)
    )
    for (i, j), count in pairs.items():
        expected = w[i] / 6 * w[j] / (6 - w[i])
        assert abs(count / n - expected) < 5 * (expected * (1 - expected) / n) ** 0.5
    assert len(pairs) == 6


@given(sizes=lengths, batch=st.integers(1, 7), pool=st.integers(1, 5), seed=st.integers(0, 2**63))
def test_buckets_are_a_permutation_whose_batches_do_not_interleave_within_a_pool(sizes, batch, pool, seed):
    rows = bucketed_order(sizes, batch_size=batch, pool=pool, seed=seed, epoch=1)
    assert sorted(rows.tolist()) == list(range(len(sizes)))
    full = [sorted(sizes[i] for i in part) for part in rows.split(batch) if len(part) == batch]
    if full and len(full) <= pool:  # one pool: batches are runs of one sorted list
        full.sort()
        run = [size for part in full for size in part]
        assert run == sorted(run)


def test_buckets_pad_less_than_a_shuffle_and_leave_out_every_sample_now_and_then():
    sizes = torch.randint(1, 500, (1003,), generator=torch.Generator().manual_seed(0))

    def padding(rows):
        return sum(int((sizes[part].max() - sizes[part]).sum()) for part in rows.split(16))

    epochs = [bucketed_order(sizes, batch_size=16, seed=0, epoch=e) for e in range(300)]
    assert padding(epochs[0]) < 0.1 * padding(torch.arange(1003))
    assert not torch.equal(epochs[0], epochs[1])
    # drop_last leaves out the last 11: over many epochs, long samples no more often than short ones
    left_out = torch.cat([sizes[rows[-11:]] for rows in epochs]).double().mean()
    assert abs(left_out - sizes.double().mean()) < 5 * sizes.double().std() / 3300**0.5


@pytest.mark.parametrize(
    "order",
    [
        partial(weighted_order, torch.arange(1.0, 24.0), num_samples=31),
        partial(weighted_order, torch.arange(1.0, 24.0), num_samples=17, replacement=False),
        partial(bucketed_order, list(range(23)), batch_size=4),
        lambda seed, epoch: [(seed + epoch) % 23, 5, 5],
    ],
    ids=["weighted", "without replacement", "bucketed", "by hand"],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_goes_on_from_any_batch_of_an_order(order, drop_last):
    loader = Loader(torch.arange(23), batch_size=2, seed=5, order=order, drop_last=drop_last)
    whole = [b.tolist() for b in loader.epoch(3)]
    expected = torch.as_tensor(order(seed=5, epoch=3)).tolist()
    joined = [i for batch in whole for i in batch]
    assert joined == expected[: len(joined)]
    assert len(expected) - len(joined) == (len(expected) % 2 if drop_last else 0)
    assert (loader.num_samples, loader.samples_per_epoch, len(loader)) == (23, len(expected), len(whole))
    for start in range(len(loader) + 1):
        assert [b.tolist() for b in loader.epoch(3, start)] == whole[start:]
        if start < len(loader):
            assert loader.samples_of(3, start) == whole[start]
    ranks = [
        Loader(torch.arange(23), batch_size=1, seed=5, order=order, drop_last=drop_last, rank=r, world_size=2)
        for r in (0, 1)
    ]
    shared = [int(i) for rank in ranks for batch in rank.epoch(3) for i in batch]
    assert sorted(shared) == sorted(expected[: len(expected) - (len(expected) % 2 if drop_last else 0)])


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (lambda: torch.arange(3), ConfigError, r"order is called as order\(seed=\.\.\., epoch=\.\.\.\).*partial\(weighted_order"),
        (lambda **_: torch.ones(3), DataError, r"shape \(M,\), int64, on the CPU; for epoch 0 it gave shape \(3,\), torch.float32"),
        (lambda **_: torch.tensor([0, 23]), DataError, r"indices in 0\.\.22, and for epoch 0 gave some in 0\.\.23"),
        (lambda **_: torch.tensor([-1, 2]), DataError, r"indices in 0\.\.22, and for epoch 0 gave some in -1\.\.2"),
        (lambda **_: torch.tensor([], dtype=torch.int64), DataError, "0 samples with batch_size=2"),
    ],
)  # fmt: skip
def test_an_order_that_is_none_is_refused_at_once(order, error, message):
    with pytest.raises(error, match=message):
        Loader(torch.arange(23), batch_size=2, seed=0, order=order)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (partial(weighted_order, [1.0] * 5), "weighted_order has 5 weights, but the dataset has 23 samples"),
        (
            partial(weighted_order, weights=torch.ones(24)),
            "weighted_order has 24 weights, but the dataset has 23",
        ),
        (
            partial(bucketed_order, [1] * 22, batch_size=4),
            "bucketed_order has 22 lengths, but the dataset has 23",
        ),
        (
            partial(bucketed_order, [1] * 23, batch_size=6),
            "bucketed_order has batch_size=6, but a batch of all processes has 4 samples.* Give it batch_size=4",
        ),
    ],
)
def test_an_order_made_for_other_data_or_batches_is_refused(order, message):
    """Weights for fewer samples leave the others out of every epoch, and nothing else would say so."""
    with pytest.raises(ConfigError, match=message):
        Loader(torch.arange(23), batch_size=2, seed=0, order=order, world_size=2, rank=1)
    fitting = partial(weighted_order, [1.0] * 23, num_samples=5)  # fewer draws are no fewer weights
    assert Loader(torch.arange(23), batch_size=2, seed=0, order=fitting).samples_per_epoch == 5


def test_an_order_that_changes_its_length_is_refused_by_epoch():
    loader = Loader(torch.arange(23), batch_size=2, seed=0, order=lambda epoch, **_: torch.arange(9 + epoch))
    with pytest.raises(DataError, match="as many indices for every epoch: 9 for epoch 0, but 10 for epoch 1"):
        loader.epoch(1)
    with pytest.raises(ConfigError, match="shuffle=False and order="):
        Loader(
            torch.arange(23), batch_size=2, seed=0, shuffle=False, order=lambda epoch, **_: torch.arange(9)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: weighted_order([0.0, 0.0], seed=0, epoch=0),
            "2 samples cannot be drawn from 2 weights of which 0 are",
        ),
        (
            lambda: weighted_order([1.0, 0.0], seed=0, epoch=0, replacement=False),
            "2 samples cannot be drawn without replacement from 2 weights of which 1 are",
        ),
        (
            lambda: weighted_order([1.0, -1.0], seed=0, epoch=0),
            "weights must be finite numbers of at least 0",
        ),
        (lambda: weighted_order([1.0, float("nan")], seed=0, epoch=0), "weights must be finite numbers"),
        (lambda: weighted_order([[1.0]], seed=0, epoch=0), r"shape \(N,\), got \(1, 1\)"),
        (lambda: weighted_order(["a"], seed=0, epoch=0), "weights must be numbers, one for each sample"),
        (lambda: weighted_order([1.0], seed=0, epoch=-1), "epoch must be an integer >= 0, got -1"),
        (
            lambda: bucketed_order([1], batch_size=0, seed=0, epoch=0),
            "batch_size must be an integer >= 1, got 0",
        ),
    ],
)
def test_illegal_weights_and_lengths_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_check_looks_at_fewer_samples_of_an_ordered_loader():
    order = partial(weighted_order, torch.ones(23))
    found = smaller(Loader(torch.arange(23), batch_size=8, seed=0, order=order), 4)
    assert sorted(torch.cat(list(found)).tolist()) == [0, 1, 2, 3]
