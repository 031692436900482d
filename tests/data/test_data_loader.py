"""The loader: the same batches whoever makes them, and errors that say what happened. Workers are in one file more."""

import random

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from steploop.core.trees import first_difference
from steploop.data.augment import random_crop
from steploop.data.loader import Loader
from steploop.data.order import epoch_order
from steploop.errors import ConfigError, DataError, EmptyDataError


class Drawing(Dataset):
    """Samples that draw from every global generator, as datasets do."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        return index, torch.rand(()), random.random(), float(np.random.rand())  # noqa: NPY002  (the point of it)


class Failing(Dataset):
    """A dataset of ten samples, the seventh of which raises."""

    def __init__(self, error, length=10):
        self.error, self.length = error, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == 6:
            raise self.error
        return index


def tensors(n=23):
    return torch.arange(n), torch.arange(n) * 2.0


def add_noise(batch, generator):
    return {"x": batch, "noise": torch.rand(3, generator=generator)}


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.booleans(), st.data())
def test_any_cursor_continues_the_epoch_exactly(n, batch_size, epoch, drop_last, data):
    how = {
        "batch_size": batch_size,
        "seed": 7,
        "drop_last": drop_last and n >= batch_size,
        "augment": add_noise,
    }
    whole = list(Loader(torch.arange(n), **how).epoch(epoch))
    loader = Loader(torch.arange(n), **how)
    assert len(whole) == len(loader)
    start = data.draw(st.integers(0, len(loader)))
    rest = loader.epoch(epoch, start)
    assert first_difference(whole[start:], list(rest)) is None
    assert rest.position == len(loader)


@given(
    n=st.integers(27, 60), batch_size=st.integers(1, 9), epoch=st.integers(0, 3), drop_last=st.booleans(),
    shuffle=st.booleans(), ranks=st.integers(1, 3),
)  # fmt: skip
def test_the_samples_of_a_batch_are_those_that_it_holds(n, batch_size, epoch, drop_last, shuffle, ranks):
    for rank in range(ranks):
        loader = Loader(
            torch.arange(n), batch_size=batch_size, seed=5, shuffle=shuffle, drop_last=drop_last, rank=rank,
            world_size=ranks,
        )  # fmt: skip
        held = [batch.tolist() for batch in loader.epoch(epoch)]
        assert [loader.samples_of(epoch, number) for number in range(len(loader))] == held


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))
def test_tensors_and_a_dataset_of_the_same_samples_give_the_same_batches(n, batch_size, epoch):
    data = tensors(n)
    how = {"batch_size": batch_size, "seed": 1}
    fast = [list(b) for b in Loader(data, **how).epoch(epoch)]
    slow = [list(b) for b in Loader(list(zip(*data, strict=True)), **how).epoch(epoch)]
    assert first_difference(fast, slow) is None
    order = epoch_order(n, seed=1, epoch=epoch)
    assert torch.cat([b[0] for b in fast]).equal(order)
    assert torch.cat([b[1] for b in fast]).equal(order * 2.0)


def test_a_batch_has_the_structure_of_the_tensors():
    x, y = tensors(6)
    how = {"batch_size": 4, "seed": 0, "shuffle": False}
    assert next(iter(Loader(x, **how))).tolist() == [0, 1, 2, 3]
    assert first_difference(next(iter(Loader({"a": x, "b": y}, **how))), {"a": x[:4], "b": y[:4]}) is None
    assert first_difference(next(iter(Loader(TensorDataset(x, y), **how))), (x[:4], y[:4])) is None


def test_the_global_generators_are_left_as_they_were():
    def state():
        return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002  (likewise)

    before = state()
    for data in (Drawing(), tensors()):
        loader = Loader(data, batch_size=4, seed=0, augment=add_noise, device="cpu")
        next(loader.epoch(0))
        list(loader.epoch(1))
    with pytest.raises(DataError):
        list(Loader(Failing(ValueError()), batch_size=4, seed=0))
    assert first_difference(state(), before) is None


def test_what_a_dataset_draws_from_global_generators_depends_on_seed_epoch_and_sample_alone():
    def samples(loader, epoch):
        fields = (torch.cat([torch.as_tensor(b[i]) for b in loader.epoch(epoch)]).tolist() for i in range(4))
        return {index: drawn for index, *drawn in zip(*fields, strict=True)}

    first = samples(Loader(Drawing(), batch_size=4, seed=0), 3)
    torch.rand(5)
    assert samples(Loader(Drawing(), batch_size=3, seed=0, shuffle=False), 3) == first
    other_epoch, other_seed = (
        samples(Loader(Drawing(), batch_size=4, seed=0), 4),
        samples(Loader(Drawing(), batch_size=4, seed=1), 3),
    )
    for other in (other_epoch, other_seed):
        assert all(a != b for i in first for a, b in zip(first[i], other[i], strict=True))
    assert len({drawn[0] for drawn in first.values()}) == len(first)


def test_a_transform_gets_a_generator_of_its_sample():
    def jitter(sample, generator):
        return sample, torch.rand((), generator=generator)

    def jitters(**how):
        loader = Loader(torch.arange(9), seed=0, transform=jitter, **how)
        return dict(zip(*(torch.cat(p).tolist() for p in zip(*loader.epoch(2), strict=True)), strict=True))

    first = jitters(batch_size=2)
    assert first == jitters(batch_size=5, shuffle=False)
    assert len(set(first.values())) == 9


def test_ranks_augment_differently_and_share_the_samples():
    def noise(rank):
        loader = Loader(torch.arange(8), batch_size=2, seed=0, augment=add_noise, rank=rank, world_size=2)
        return list(loader.epoch(0))

    mine, theirs = noise(0), noise(1)
    assert len(mine) == len(theirs) == 2
    assert sorted(torch.cat([b["x"] for b in mine + theirs]).tolist()) == list(range(8))
    drawn = [tuple(b["noise"].tolist()) for b in mine + theirs]
    assert len(set(drawn)) == 4


def test_a_dataset_may_fetch_many_at_once():
    class Batched(Drawing):
        def __getitems__(self, indices):
            return [(i, torch.rand(())) for i in indices]

    first = list(Loader(Batched(), batch_size=4, seed=0).epoch(1))
    assert first_difference(first, list(Loader(Batched(), batch_size=4, seed=0).epoch(1))) is None
    assert first_difference(first[2:], list(Loader(Batched(), batch_size=4, seed=0).epoch(1, 2))) is None
    assert sorted(torch.cat([b[0] for b in first]).tolist()) == list(range(11))


def test_collate_makes_the_batches():
    got = next(Loader(["b", "a", "c"], batch_size=3, seed=0, shuffle=False, collate="".join).epoch(0))
    assert got == "bac"
    batch = next(
        Loader(tensors(), batch_size=2, seed=0, shuffle=False, collate=lambda s: default_collate(s)[1]).epoch(
            0
        )
    )
    assert batch.tolist() == [0.0, 2.0]


def test_time_and_position_are_counted():
    loader = Loader(tensors(), batch_size=10, seed=0)
    batches = loader.epoch(0, 1)
    assert (batches.position, batches.waited_s) == (1, 0.0)
    next(batches)
    assert batches.position == 2
    assert batches.waited_s > 0


def test_a_loader_is_frozen_and_has_a_readable_repr():
    loader = Loader(tensors(), batch_size=10, seed=0)
    assert repr(loader).startswith("Loader(dataset=tuple, batch_size=10, seed=0, shuffle=True")
    assert (len(loader), loader.num_samples) == (3, 23)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        loader.batch_size = 3
    loader.close()


@pytest.mark.parametrize("error", [ValueError("odd"), StopIteration("odd"), MemoryError("odd")])
def test_an_exception_of_the_dataset_names_sample_and_batch(error):
    batches = Loader(Failing(error), batch_size=4, seed=0, shuffle=False).epoch(0)
    next(batches)
    name = type(error).__name__
    with pytest.raises(
        DataError, match=f"making batch 1 failed at sample 6: {name}: odd; look at"
    ) as excinfo:
        next(batches)
    assert excinfo.value.__cause__ is error
    with pytest.raises(
        DataError, match=r"broke off before batch 1 with DataError; to go on, call epoch\(\.\.\., start=1\)"
    ):
        next(batches)


def test_a_dataset_shorter_than_it_says_is_told_so():
    class Lying(list):
        def __len__(self):
            return 9

    with pytest.raises(
        DataError, match=r"batch 1 failed at sample 5: IndexError: .*__len__ says 9: it must not say more"
    ):
        list(Loader(Lying([0, 1, 2, 3, 4]), batch_size=4, seed=0, shuffle=False))


def test_a_collation_that_fails_names_all_samples_of_the_batch():
    with pytest.raises(
        DataError,
        match=r"making batch 0 failed at samples \[0, 1\]: RuntimeError: stack expects.*need collate=",
    ):
        list(Loader([(torch.zeros(2),), (torch.zeros(3),)], batch_size=2, seed=0, shuffle=False))


def test_only_the_first_samples_of_a_large_batch_are_listed():
    with pytest.raises(DataError, match=r"at samples \[0, 1, .*, 15, \.\.\. 20 in all\]: ValueError"):
        list(Loader(list(range(20)), batch_size=20, seed=0, shuffle=False, collate=lambda _: int("x")))


def test_nothing_to_load_is_found_out_before_anything_runs():
    with pytest.raises(EmptyDataError, match="the dataset has no samples"):
        Loader([], batch_size=4, seed=0)
    with pytest.raises(
        EmptyDataError, match="3 samples with batch_size=4 and drop_last=True make no batch; lower batch_size"
    ):
        Loader([1, 2, 3], batch_size=4, seed=0, drop_last=True)
    with pytest.raises(EmptyDataError, match=r"3 samples .* no batch for each of 4 processes"):
        Loader([1, 2, 3], batch_size=4, seed=0, world_size=4)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


class Broken(Failing):
    def __len__(self):
        raise self.error


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "is a Endless.*no samples by index.*wrap it in a Stream"),
        ((i for i in range(3)), "is a generator.*no samples by index"),
        (Broken(ValueError()), r"len\(\) of the dataset \(Broken\) failed: ValueError"),
        ((torch.zeros(3), torch.zeros(4)), r"common first axis.*0: \(3,\), 1: \(4,\)"),
        (torch.tensor(1.0), r"common first axis.*the tensor: \(\)"),
    ],
)
def test_data_without_positions_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        Loader(data, batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size must be an integer >= 1, got 2\.0\."),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"shuffle": 1}, r"shuffle must be True or False, got 1\."),
        ({"pin_memory": "yes"}, "pin_memory must be True or False, got 'yes'"),
        ({"num_workers": -1}, "num_workers must be an integer >= 0, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be an integer in 0\.\.1, got 2"),
        ({"device": "gpu"}, "device must be a torch device such as 'cpu' or 'cuda:0', got 'gpu'"),
    ],
)
def test_illegal_arguments_are_named(how, message):
    with pytest.raises(ConfigError, match=message):
        Loader([1, 2, 3], **({"batch_size": 1, "seed": 0} | how))


def test_a_position_that_does_not_exist_is_refused():
    loader = Loader([1, 2, 3], batch_size=2, seed=0)
    assert list(loader.epoch(0, 2)) == []
    with pytest.raises(ConfigError, match=r"start must be an integer in 0\.\.2, got 3"):
        loader.epoch(0, 3)
    with pytest.raises(ConfigError, match="epoch must be an integer >= 0, got -1"):
        loader.epoch(-1)


def test_the_samples_of_a_batch_that_does_not_exist_are_refused():
    loader = Loader(torch.arange(10), batch_size=5, seed=0)
    for epoch, batch in [(0, 2), (0, -1), (-1, 0)]:
        with pytest.raises(ConfigError, match="batch must be" if epoch == 0 else "epoch must be"):
            loader.samples_of(epoch, batch)


def test_workers_cannot_read_what_lies_on_the_device():
    with pytest.raises(ConfigError, match="num_workers=1, but the data lie on the device"):
        Loader(torch.zeros(3, device="meta"), batch_size=1, seed=0, num_workers=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("on_device", [False, True])
def test_batches_on_cuda_are_those_of_the_cpu(on_device):
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)

    def crop(batch, generator):
        return random_crop(batch, padding=2, generator=generator)

    how = {"batch_size": 8, "seed": 0, "augment": crop}
    wanted = list(Loader(images, **how).epoch(1, 2))
    data = images.cuda() if on_device else images
    got = [batch.cpu() for batch in Loader(data, **how, device="cuda").epoch(1, 2)]
    assert first_difference(got, wanted) is None
