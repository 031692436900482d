"""One checkpoint from any number of ranks: the same digest, for any number of ranks, whole or not at all."""

import json
import warnings
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import listed, make_batches, make_linear, make_state, train_step
from hypothesis import given
from hypothesis import strategies as st
from rank_processes import RankProcesses
from safetensors.torch import load_file
from torch import distributed

from steploop import Ranks, checkpoint, split_parts
from steploop.checkpoint.format import shards
from steploop.checkpoint.format.sealing import seal
from steploop.checkpoint.packing import collect
from steploop.checkpoint.saving import save_state
from steploop.checkpoint.storage.local import LocalFs
from steploop.checkpoint.weight_files import read_weights
from steploop.core.trees import first_difference
from steploop.errors import CheckpointDamagedError, CheckpointWriteError

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def four():
    ranks = RankProcesses(4)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def _many_files(monkeypatch):
    monkeypatch.setattr(shards, "LEAST_SHARE_BYTES", 1)


_groups = {}


def ranks_of(size):
    """The first ``size`` of the processes as ranks, four parts each; None on the others."""
    shards.LEAST_SHARE_BYTES = 1  # in a process of its own: a small model in many files
    rank = distributed.get_rank()
    if not _groups:
        _groups.update({n: None if n == 4 else distributed.new_group(list(range(n))) for n in SIZES})
    return Ranks(rank=rank, size=size, parts=4, group=_groups[size]) if rank < size else None


def state_of(ranks, steps=2, seed=0):
    """A state with everything awkward after some steps."""
    return reduce(
        train_step, (split_parts(b, ranks) for b in make_batches(steps)), make_state(seed, ranks=ranks)
    )


def quietly(function, *arguments):
    """What it returns, or its error as kind and text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function(*arguments)
    except Exception as error:  # noqa: BLE001  (the test looks at it)
        return type(error).__name__, str(error)


# -- saved on N, loaded on M ----------------------------------------------------------------------------------------


def save_on(size, folder):
    if (ranks := ranks_of(size)) is None:
        return None
    state = state_of(ranks)
    return checkpoint.save(state, Path(folder) / f"on-{size}"), checkpoint.digest(state)


def load_on(size, folder):
    """What differs between the state that this number of ranks has and what each checkpoint holds; its digest."""
    if (ranks := ranks_of(size)) is None:
        return None
    state, found = state_of(ranks), {}
    for path in sorted(Path(folder).iterdir()):
        loaded = checkpoint.load(path, like=make_state(1, ranks=ranks))
        same = first_difference(vars(state.tensors), vars(loaded.tensors))
        found[path.name] = same, checkpoint.digest(loaded), loaded.step
    return found


def test_what_any_number_of_ranks_saves_any_number_loads_and_the_digest_is_one(four, tmp_path):
    digests = {d for size in SIZES for pair in four.run(save_on, size, str(tmp_path)) if pair for d in pair}
    assert len(digests) == 1
    expected = {f"on-{size}": (None, digests.copy().pop(), 2) for size in SIZES}
    for size in SIZES:
        found = four.run(load_on, size, str(tmp_path))
        assert found[:size] == [expected] * size
    assert (
        len(listed(tmp_path / "on-4")) > len(listed(tmp_path / "on-2")) > len(listed(tmp_path / "on-1")) == 4
    )
    for size in SIZES:  # in this process, with ranks and without
        opened = checkpoint.open_checkpoint(tmp_path / f"on-{size}")
        assert {opened.digest} == digests
        loaded = checkpoint.load(tmp_path / f"on-{size}", like=make_state(1, ranks=Ranks(parts=4)))
        assert {checkpoint.digest(loaded)} == digests


def test_files_of_ranks_open_with_plain_safetensors_and_the_index_says_where_tensors_are(four, tmp_path):
    four.run(save_on, 4, str(tmp_path))
    folder = tmp_path / "on-4"
    state = state_of(Ranks(parts=4))
    expected = dict(state.params) | dict(state.buffers)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("model-*")}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    tensors = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert first_difference(dict(sorted(expected.items())), dict(sorted(tensors.items()))) is None
    for name in ("state.json", "environment.json"):
        (folder / name).unlink()
    found = read_weights(folder).tensors  # as files of Hugging Face are read
    assert first_difference(dict(sorted(expected.items())), dict(sorted(found.items()))) is None


def test_a_small_model_is_one_file_from_any_number_of_ranks(four, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_SHARE_BYTES", 64 << 20)
    four.run(save_as_usual, str(tmp_path / "a"))
    assert listed(tmp_path / "a") == [
        "environment.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = state_of(Ranks(parts=4))
    checkpoint.save(state, tmp_path / "b")
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def save_as_usual(path):
    state = state_of(ranks_of(4))
    shards.LEAST_SHARE_BYTES = 64 << 20
    return checkpoint.save(state, path)


def test_a_state_without_ranks_is_saved_as_before_and_each_version_loads_into_the_other(tmp_path):
    ranks = Ranks(parts=4)
    one, two = make_state(0), make_state(0, ranks=ranks)
    first, second = checkpoint.save(one, tmp_path / "1"), checkpoint.save(two, tmp_path / "2")
    versions = [json.loads((tmp_path / n / "state.json").read_text())["version"] for n in "12"]
    assert versions == [1, 2]
    assert first != second
    with pytest.warns(checkpoint.InexactResumeWarning, match="parts 4 there, 1 here"):
        loaded = checkpoint.load(tmp_path / "2", like=make_state(1))
    assert checkpoint.digest(loaded) == first
    with pytest.warns(checkpoint.InexactResumeWarning, match="parts 1 there, 4 here"):
        loaded = checkpoint.load(tmp_path / "1", like=make_state(1, ranks=ranks))
    assert checkpoint.digest(loaded) == second


# -- in the background ----------------------------------------------------------------------------------------------


def save_in_background(folder):
    ranks = ranks_of(4)
    state = state_of(ranks)
    store = checkpoint.CheckpointStore(folder, keep=2, background=True)
    store.prepare(ranks=ranks)
    digests = {}
    for batch in make_batches(3):
        digests[state.step] = checkpoint.digest(state)
        store.save(state)
        state = train_step(state, split_parts(batch, ranks))  # its sums meet no message of the thread
    store.wait()
    loaded = store.load(like=make_state(1, ranks=ranks))
    return digests, store.steps(), checkpoint.digest(loaded)


def test_ranks_save_in_the_background_while_they_train(four, tmp_path):
    (digests, steps, loaded), *others = four.run(save_in_background, str(tmp_path / "store"))
    assert all(other == (digests, steps, loaded) for other in others)
    assert steps == [3, 4]
    assert loaded == digests[4]
    held = {n: checkpoint.open_checkpoint(tmp_path / "store" / f"step-{n:012d}").digest for n in steps}
    assert held == {n: digests[n] for n in steps}


# -- what fails on one rank -----------------------------------------------------------------------------------------


class FullDisk(LocalFs):
    """A disk that is full for one rank, at the second file or as late as at the flush."""

    def __init__(self, rank, moment):
        self._fails = distributed.get_rank() == rank
        self._moment = moment

    def create(self, path):
        file = super().create(path)
        if self._fails and path.name.startswith("optimizer"):
            if self._moment == "flush":
                file.sync = partial(self._refuse, file)
            else:
                self._refuse(file)
        return file

    @staticmethod
    def _refuse(file):
        file.close()
        raise OSError(28, "No space left on device")


def fail_to_save(folder, rank, moment):
    state = state_of(ranks_of(4))
    how = {"frozen": True, "overwrite": True, "wait_s": 0.0}
    checkpoint.save(state, Path(folder) / "a", overwrite=True)
    found = quietly(partial(save_state, FullDisk(rank, moment), state, Path(folder) / "a", **how))
    again = checkpoint.save(state, Path(folder) / "a", overwrite=True)
    return found, again == checkpoint.digest(state)


@pytest.mark.parametrize(("rank", "moment"), [(0, "create"), (2, "create"), (3, "flush")])
def test_a_rank_that_cannot_write_fails_the_save_on_all_with_one_sentence(four, tmp_path, rank, moment):
    found = four.run(fail_to_save, str(tmp_path), rank, moment)
    said = f"{tmp_path}/a could not be written (try 3 of 3): on rank {rank}: No space left on device"
    assert found == [(("CheckpointWriteError", said), True)] * 4
    assert listed(tmp_path) == ["a"]


def save_nonfinite(folder):
    state = state_of(ranks_of(4))
    if distributed.get_rank() == 1:  # which owns one of them
        with torch.no_grad():
            for p in state.params.values():
                p.fill_(torch.inf)
    return quietly(checkpoint.save, state, Path(folder) / "a")


def test_a_parameter_that_is_not_finite_on_its_owner_is_saved_by_none(four, tmp_path):
    found = four.run(save_nonfinite, str(tmp_path))
    assert {kind for kind, _ in found} == {"NonFiniteError"}
    assert len({text for _, text in found}) == 1
    assert found[0][1].startswith("on rank 1: The parameter ")
    assert listed(tmp_path) == []


def save_differently(folder):
    state = state_of(ranks_of(4), steps=1)
    return quietly(checkpoint.save, state.replace(epoch=int(distributed.get_rank() == 3)), Path(folder) / "a")


def test_ranks_with_different_states_save_nothing(four, tmp_path):
    found = four.run(save_differently, str(tmp_path))
    assert {kind for kind, _ in found} == {"ConfigError"}
    assert all(
        text.startswith("The state to be saved is another on rank 3 than on rank 0.") for _, text in found
    )
    assert listed(tmp_path) == []


def spend(folder):
    state = state_of(ranks_of(4))
    if distributed.get_rank() == 1:
        state.lease.tear()
    return quietly(checkpoint.save, state, Path(folder) / "a")


def test_a_state_that_is_spent_on_one_rank_is_saved_by_none(four, tmp_path):
    found = four.run(spend, str(tmp_path))
    assert {kind for kind, _ in found} == {"SpentStateError"}
    assert all(text.startswith("on rank 1: checkpoint.save: this state is spent") for _, text in found)
    assert listed(tmp_path) == []


# -- what is damaged ------------------------------------------------------------------------------------------------


def load_all(folder):
    ranks = ranks_of(4)
    return quietly(lambda: checkpoint.digest(checkpoint.load(folder, like=make_state(1, ranks=ranks))))


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "a tensor": ("model-00002-of-00004.safetensors", flipped, "changed"),
    "a file cut short": ("optimizer-00003-of-00004.safetensors", lambda data: data[:-1], "cut short"),
    "a header": ("model-00001-of-00004.safetensors", lambda data: data[:20] + b"x" + data[21:], "header"),
    "an index": ("model.safetensors.index.json", lambda data: data.replace(b"-00001-", b"-00002-"), "index.json"),
    "a file that is gone": ("optimizer-00004-of-00004.safetensors", None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_that_one_rank_sees_all_refuse(four, tmp_path, kind):
    digest = four.run(save_on, 4, str(tmp_path))[0][0]
    name, damage, said = DAMAGE[kind]
    path = tmp_path / "on-4" / name
    data = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(data))
    found = four.run(load_all, str(tmp_path / "on-4"))
    assert {outcome[0] for outcome in found} == {"CheckpointDamagedError"}
    assert len({outcome[1] for outcome in found}) == 1
    assert said in found[0][1]
    assert "on rank " in found[0][1]
    with pytest.raises(CheckpointDamagedError, match=said):
        checkpoint.open_checkpoint(tmp_path / "on-4")
    path.write_bytes(data)
    assert four.run(load_all, str(tmp_path / "on-4")) == [digest] * 4


def load_newest(folder):
    ranks = ranks_of(4)
    state = state_of(ranks, steps=1)
    store = checkpoint.CheckpointStore(folder)
    store.prepare(ranks=ranks)
    digests = [checkpoint.digest(state)]
    store.save(state)
    state = train_step(state, split_parts(make_batches(1)[0], ranks))
    store.save(state)
    if ranks.rank == 1:
        path = next(store.path(2).glob("model-00003*"))
        path.write_bytes(flipped(path.read_bytes()))
    ranks.barrier()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = store.load(like=make_state(1, ranks=ranks))
    said = [str(w.message) for w in seen if w.category is checkpoint.DamagedCheckpointWarning]
    return checkpoint.digest(loaded) == digests[0], said


def test_a_damaged_newest_checkpoint_is_put_aside_once_and_all_go_on_from_the_older_one(four, tmp_path):
    found = four.run(load_newest, str(tmp_path / "store"))
    assert [fine for fine, _ in found] == [True] * 4
    assert [len(said) for _, said in found] == [1, 0, 0, 0]
    assert "It was renamed to .corrupt-step-000000000002." in found[0][1][0]
    assert listed(tmp_path / "store") == [".corrupt-step-000000000002", "step-000000000001"]


# -- the manifest ---------------------------------------------------------------------------------------------------


HOSTILE = {
    "a tensor in no file": (lambda b: b["files"]["model.safetensors"]["tensors"].remove("bias"), "do not hold each tensor of model.safetensors once"),
    "a tensor in a file twice": (lambda b: b["files"]["model.safetensors"]["tensors"].append("bias"), "do not hold each tensor of model.safetensors once"),
    "a file elsewhere": (lambda b: b["files"].update({"../x-00001-of-00002.safetensors": b["files"].pop("model.safetensors")}), "which is no file of model.safetensors"),
    "a file of another table": (lambda b: b["files"]["model.safetensors"].update(table="optimizer.safetensors"), "which is no file of optimizer.safetensors"),
    "a table that is a list": (lambda b: b["files"]["model.safetensors"].update(table=[]), "expected the table and the tensors of"),
    "names that are numbers": (lambda b: b["files"]["model.safetensors"].update(tensors=[1, 2]), "do not hold each tensor"),
    "a digest of a tensor": (lambda b: b["tensors"]["model.safetensors"]["bias"].update(sha256="0" * 63), "expected the SHA-256 of 'bias'"),
    "a digest of the state": (lambda b: b.update(digest="0" * 64), "says that the digest of its state is 000"),
    "another state": (lambda b: b["state"].update(several=True), "says that the digest of its state is"),
    "no table": (lambda b: b["metadata"].pop("model.safetensors"), "tables of tensors and their metadata do not match"),
    "a further key": (lambda b: b.update(more=1), "which are not those of version 2"),
    "tensors that are a list": (lambda b: b["tensors"].update({"model.safetensors": []}), "expected an object"),
    "a table elsewhere": (lambda b: [b[k].update({"../m": b[k].pop("model.safetensors")}) for k in ("tensors", "metadata")], "which are no names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_is_refused(tmp_path, kind):
    checkpoint.save(make_linear(ranks=Ranks()), tmp_path / "a")
    change, said = HOSTILE[kind]
    body = json.loads((tmp_path / "a" / "state.json").read_text())
    change(body)
    (tmp_path / "a" / "state.json").write_bytes(seal(body)[0])
    with pytest.raises(CheckpointDamagedError) as error:
        checkpoint.open_checkpoint(tmp_path / "a")
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"aliases": 1, "complex128": []}', '{"aliases": {}}', "[" * 10_000]
)
def test_metadata_that_is_none_is_refused(text):
    with pytest.raises(CheckpointDamagedError, match="The metadata of a table is not what steploop writes"):
        shards.metadata_of(text, ["a"])


# -- who owns what --------------------------------------------------------------------------------------------------


@given(
    sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 1 << 40), max_size=20),
    count=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
def test_the_heaviest_tensors_go_to_the_lightest_ranks_whatever_the_order(sizes, count, order):
    """Each has one owner, no rank holds more than the mean and the heaviest one, and the order of the table is nothing."""
    owners = shards.lightest_first(sizes, count)
    assert owners.keys() == sizes.keys()
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(count)]
    assert max(loads) <= sum(sizes.values()) / count + max(sizes.values(), default=0)
    names = list(sizes)
    order.shuffle(names)
    assert shards.lightest_first({name: sizes[name] for name in names}, count) == owners


def test_ranks_write_no_file_that_is_not_worth_it(monkeypatch):
    state = make_linear(ranks=Ranks())
    tables = collect(state).specs  # 32 bytes in the model
    monkeypatch.setattr(shards, "LEAST_SHARE_BYTES", 16)
    assert {s.owner for s in shards.cut(tables, 8).values()} == {0, 1}
    monkeypatch.setattr(shards, "LEAST_SHARE_BYTES", 33)
    assert {s.owner for s in shards.cut(tables, 8).values()} == {0}


def test_a_save_that_fails_in_one_process_says_so_without_a_rank(tmp_path):
    state = make_linear(ranks=Ranks())
    checkpoint.save(state, tmp_path / "a")
    with pytest.raises(
        CheckpointWriteError, match=r"/a exists already: choose another name, or pass overwrite=True"
    ):
        checkpoint.save(state, tmp_path / "a")
