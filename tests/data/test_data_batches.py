"""A plain DataLoader as the batches of a run: a Loader where it can be one, else a Stream, else refused in words."""

import itertools

import pytest
import torch
from points_recipe import Config, build
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from steploop.data import Batches, Loader, Stream, as_batches
from steploop.errors import ConfigError, DataError, EmptyDataError

N = 11
DATA = TensorDataset(torch.arange(N), torch.arange(N) * 2)


class Drawing(Dataset):
    """Samples of which a part is drawn from the global generator, as torchvision's transforms draw."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return index, torch.rand(())


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(N))


class Measured(Numbers):
    def __len__(self):
        return N


class EpochSampler(SequentialSampler):
    """Sampler whose order depends on set_epoch, as that of a distributed run does."""

    def set_epoch(self, epoch):
        self.first = epoch

    def __iter__(self):
        return ((i + self.first) % N for i in range(N))


class OtherLoader(DataLoader):
    """Somebody else's loader."""


def rows(batches):
    return [[int(i) for i in (b[0] if isinstance(b, (list, tuple)) else b)] for b in batches]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_dataloader_becomes_a_loader_with_its_settings(shuffle, workers):
    given = DataLoader(
        Drawing(), batch_size=3, shuffle=shuffle, drop_last=True, num_workers=workers, collate_fn=list
    )
    batches = as_batches(given, seed=7)
    assert isinstance(batches, Loader)
    assert (batches.batch_size, batches.shuffle, batches.drop_last, batches.num_workers, batches.seed) == (
        3, shuffle, True, workers, 7,
    )  # fmt: skip
    whole = list(batches.epoch(2))
    assert [len(b) for b in whole] == [3, 3, 3]
    assert isinstance(whole[0], list)  # what its collate_fn makes
    order = [i for b in whole for i, _ in b]
    assert (order == list(range(9))) is not shuffle
    assert list(batches.epoch(2, 1)) == whole[1:]
    if not shuffle:  # the same samples as before, in the same batches
        assert [[i for i, _ in b] for b in given] == [[i for i, _ in b] for b in whole]


def test_tensors_are_cut_into_the_batches_that_the_dataloader_would_make():
    given = DataLoader(DATA, batch_size=4)
    for ours, theirs in zip(as_batches(given, seed=0).epoch(0), given, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_generator_of_its_own_decides_the_order():
    def order(generator_seed, seed):
        generator = torch.Generator().manual_seed(generator_seed)
        return rows(
            as_batches(DataLoader(DATA, batch_size=2, shuffle=True, generator=generator), seed=seed).epoch(0)
        )

    assert order(1, 0) == order(1, 5) != order(2, 0)


def test_a_weighted_sampler_keeps_its_weights():
    weights = [0.0] * 9 + [1.0, 1.0]
    batches = as_batches(DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler(weights, 30)), seed=0)
    drawn = [i for batch in rows(batches.epoch(0)) for i in batch]
    assert (len(drawn), set(drawn)) == (30, {9, 10})
    assert rows(batches.epoch(0, 3)) == rows(batches.epoch(0))[3:]


@pytest.mark.parametrize(
    "make",
    [
        lambda: OtherLoader(Drawing(), batch_size=3, shuffle=True),
        lambda: DataLoader(Drawing(), batch_sampler=BatchSampler(RandomSampler(range(N), replacement=True), 3, drop_last=False)),
        lambda: DataLoader(Drawing(), batch_size=3, sampler=RandomSampler(range(N), num_samples=7)),
        lambda: DataLoader(Drawing(), batch_size=3, shuffle=True, worker_init_fn=print),
        lambda: DataLoader(Drawing(), batch_size=3, sampler=RandomSampler(range(N), replacement=True, generator=torch.Generator())),
        lambda: DataLoader(Measured(), batch_size=3),
        lambda: DataLoader(Drawing(), batch_size=None, sampler=RandomSampler(range(N))),
    ],
    ids=range(7),
)  # fmt: skip
def test_other_loaders_are_read_as_they_are_in_an_order_of_seed_and_epoch(make):
    batches = as_batches(make(), seed=3)
    assert isinstance(batches, Stream)
    assert len(batches) == len(make())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again = (repr(list(batches.epoch(e))) for e in (0, 0))
    later = repr(list(as_batches(make(), seed=3).epoch(1)))  # as after a resume: epoch 0 was not read
    assert first == again
    assert later == repr(list(batches.epoch(1)))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(DataError, match="cannot continue at batch 1 of epoch 0"):
        batches.epoch(0, 1)


def test_steps_between_the_batches_do_not_change_what_is_drawn():
    batches = as_batches(OtherLoader(Drawing(), batch_size=3, shuffle=True), seed=3)
    expected, disturbed = list(batches.epoch(0)), []
    for batch in batches.epoch(0):
        torch.rand(5)
        disturbed.append(batch)
    assert repr(disturbed) == repr(expected)


def test_a_sampler_hears_of_its_epoch():
    batches = as_batches(DataLoader(DATA, batch_size=4, sampler=EpochSampler(DATA)), seed=0)
    assert rows(batches.epoch(3))[0] == [3, 4, 5, 6]
    assert rows(batches.epoch(0))[0] == [0, 1, 2, 3]


def test_a_list_is_the_same_batches_in_every_epoch_from_any_on():
    batches = as_batches([(torch.zeros(2), i) for i in range(4)], seed=0)
    assert [b[1] for b in batches.epoch(5, 2)] == [2, 3]
    assert len(batches) == 4
    assert as_batches(batches, seed=1) is batches
    assert isinstance(batches, Batches)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (DataLoader(Numbers(), batch_size=3), DataError, r"the DataLoader does not know how many batches.*Stream\(lambda epoch, start: loader"),
        (iter([1]), ConfigError, "got a list_iterator. A list_iterator is spent after one epoch: Stream"),
        ((i for i in [1]), ConfigError, "got a generator. A generator is spent after one epoch: Stream"),
        (DATA, ConfigError, r"got a TensorDataset\. Of data make batches with Loader\(data"),
        ((torch.zeros(3), torch.zeros(3)), ConfigError, r"got a tuple\. Of data make batches"),
        (torch.zeros(3), ConfigError, r"got a Tensor\. Of data make"),
        ({"x": torch.zeros(3)}, ConfigError, r"got a dict\. Of data make"),
        (None, ConfigError, r"got a NoneType\."),
        (Numbers(), ConfigError, r"got a Numbers\. Give a DataLoader of it, in Stream\(lambda epoch, start: loader"),
        ([], EmptyDataError, "batches is an empty list"),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_makes_no_batches_is_refused_in_words(value, error, message):
    with pytest.raises(error, match=message):
        as_batches(value, seed=0)


def test_a_recipe_takes_a_dataloader_and_says_what_became_of_it():
    import attrs

    recipe = build(Config(), torch.device("cpu"))
    seed = next(iter(recipe.state.values())).seed if isinstance(recipe.state, dict) else recipe.state.seed
    ours = attrs.evolve(recipe, batches=DataLoader(DATA, batch_size=2, shuffle=True))
    assert rows(ours.batches.epoch(1)) == rows(Loader(DATA, batch_size=2, seed=seed).epoch(1))
    assert ours.notes[-1].startswith("The DataLoader became a Loader: ")
    assert attrs.evolve(ours, epochs=3).notes == ours.notes
    other = attrs.evolve(recipe, batches=OtherLoader(Subset(DATA, range(6)), batch_size=2))
    assert (
        "OtherLoader is read from its beginning: the run can go on from the end of an epoch"
        in other.notes[-1]
    )
    with pytest.raises(ConfigError, match=r"batches must be a Loader, a Stream, a DataLoader or a list"):
        attrs.evolve(recipe, batches=itertools.count())
