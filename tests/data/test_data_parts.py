"""Parts of batches: the same samples and the same augmentation for any number of ranks, and nothing else is read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from steploop import Ranks
from steploop.core.trees import first_difference
from steploop.data import Loader, Stream
from steploop.data.batches import epoch_of_parts
from steploop.errors import DataError


def numbered(parts, size):
    """The views of `size` ranks on batches of `parts` parts."""
    return [Ranks(rank=rank, size=size, parts=parts) for rank in range(size)]


def divisors(parts):
    return [size for size in range(1, parts + 1) if parts % size == 0]


def add_noise(batch, generator):
    return {"x": batch, "noise": torch.rand(3, generator=generator)}


def all_parts(batches, parts, size, epoch=0, start=0):
    """The batches of an epoch, each as the list of its parts, put together from all ranks."""
    found = [list(epoch_of_parts(batches, ranks, epoch, start)) for ranks in numbered(parts, size)]
    for ranks, one in zip(numbered(parts, size), found, strict=True):
        assert all((part.numbers, part.total) == (ranks.mine, parts) for part in one)
    return [[part for one in ranks for part in one.batches] for ranks in zip(*found, strict=True)]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 3), st.data())
def test_the_parts_of_all_ranks_are_the_batch_whatever_its_size(n, batch_size, parts, drop_last, epoch, data):
    loader = Loader(torch.arange(n), batch_size=batch_size, seed=3, drop_last=drop_last and n >= batch_size)
    start = data.draw(st.integers(0, len(loader)))
    whole = list(loader.epoch(epoch, start))
    for size in divisors(parts):
        cut = all_parts(loader, parts, size, epoch, start)
        assert len(cut) == len(whole)
        for batch, pieces in zip(whole, cut, strict=True):
            held = [[] if piece is None else piece.tolist() for piece in pieces]
            assert [sample for piece in held for sample in piece] == batch.tolist()
            sizes = [len(piece) for piece in held]
            assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 5))
def test_the_augmentation_of_a_part_depends_on_its_number_and_not_on_the_ranks(n, batch_size, parts):
    def cut(size):
        loader = Loader(torch.arange(n), batch_size=batch_size, seed=3, augment=add_noise, device="cpu")
        return all_parts(loader, parts, size, 2)

    alone = cut(1)
    drawn = [tuple(part["noise"].tolist()) for batch in alone for part in batch if len(part["noise"])]
    assert len(set(drawn)) == len(drawn)
    for size in divisors(parts):
        assert first_difference(cut(size), alone) is None


def test_one_part_is_the_batch_of_a_loader_without_ranks():
    loader = Loader(torch.arange(11), batch_size=4, seed=3, augment=add_noise)
    whole = [[batch] for batch in loader.epoch(1)]
    assert first_difference(all_parts(loader, 1, 1, 1), whole) is None


class Counting(Dataset):
    """Samples that draw from a global generator; notes which were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 14

    def __getitem__(self, index):
        self.read.append(index)
        return index, torch.rand(())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_rank_reads_its_own_samples_only_and_workers_change_nothing(workers):
    def read(size):
        loaders = [
            Loader(Counting(), batch_size=5, seed=1, num_workers=workers, augment=add_noise)
            for _ in range(size)
        ]
        batches = [
            list(loader.in_parts(ranks)) for loader, ranks in zip(loaders, numbered(4, size), strict=True)
        ]
        samples = [loader.dataset.read for loader in loaders]
        return [[p for one in ranks for p in one.batches] for ranks in zip(*batches, strict=True)], samples

    alone, _ = read(1)
    shared, samples = read(2)
    assert first_difference(shared, alone) is None
    if workers == 0:
        assert sorted(samples[0] + samples[1]) == list(range(14))
        assert first_difference(read(4)[0], alone) is None


def test_a_stream_is_read_whole_by_every_rank_and_cut():
    batches = [torch.arange(7), torch.arange(3)]
    stream = Stream(lambda _, start: iter(batches[start:]), length=2, restorable=True)
    for size in (1, 2, 4):
        held = all_parts(stream, 4, size)
        assert [[[] if p is None else p.tolist() for p in parts] for parts in held] == [
            [[0], [1, 2], [3, 4], [5, 6]],
            [[], [0], [1], [2]],
        ]
    assert len(all_parts(stream, 2, 2, 0, 1)) == 1


def test_batches_of_a_class_of_ones_own_are_cut_too():
    class Own:
        def epoch(self, epoch, start=0):
            return iter([torch.arange(4) + epoch][start:])

        def __len__(self):
            return 1

    assert [[p.tolist() for p in parts] for parts in all_parts(Own(), 2, 2, 5)] == [[[5, 6], [7, 8]]]
    assert [batch.tolist() for batch in epoch_of_parts(Own(), None, 5, 0)] == [[5, 6, 7, 8]]


def test_a_batch_that_cannot_be_cut_is_refused_by_a_stream():
    stream = Stream(lambda *_: ["a text"], length=1)
    with pytest.raises(DataError, match=r"split_parts: cannot count the samples"):
        list(stream.in_parts(Ranks(parts=2)))
