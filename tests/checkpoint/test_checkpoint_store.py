"""A store of checkpoints: the newest that verifies, retention, and saving in the background."""

import contextlib
import os
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FaultyFs, MemoryFs, listed, make_batches, make_linear, make_state, train_step
from hypothesis import given
from hypothesis import strategies as st

from steploop import checkpoint
from steploop.checkpoint import BackgroundSaver, CheckpointStore, DamagedCheckpointWarning
from steploop.checkpoint.packing import collect
from steploop.checkpoint.saving import write_collected
from steploop.checkpoint.storage import commit as commit_module
from steploop.checkpoint.storage.litter import discard
from steploop.checkpoint.storage.local import LOCAL
from steploop.core.early_stopping import Best
from steploop.errors import (
    CheckpointDamagedError,
    CheckpointUnsupportedError,
    CheckpointWriteError,
    ConfigError,
)
from steploop.testing.state_comparison import require_same

CPU = torch.device("cpu")


def at(step, *, best=None, seed=0):
    kept = None if best is None else Best(value=0.0, step=best, epoch=0)
    return make_linear(seed).replace(applied_steps=step, best=kept)


def filled(directory, steps, **options):
    store = CheckpointStore(directory, **options)
    store.prepare()
    for step in steps:
        store.save(at(step))
    return store


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_is_the_highest_step_as_a_number(tmp_path):
    """Neither names nor clocks decide. 9900 comes before 10000, and an old run's files are not 'newer'."""
    store = filled(tmp_path / "c", [10_000, 9_900], keep=2)
    os.utime(store.path(9_900), (2**31, 2**31))
    assert store.steps() == [9_900, 10_000]
    assert store.load(like=at(0)).step == 10_000
    assert listed(tmp_path / "c") == ["step-000000009900", "step-000000010000"]


def test_an_empty_store_gives_none_and_a_missing_step_an_error(tmp_path):
    store = filled(tmp_path, [])
    assert store.load(like=at(0)) is None
    assert CheckpointStore(tmp_path / "missing").load(like=at(0)) is None
    with pytest.raises(CheckpointDamagedError, match=r"There is no checkpoint .*step-000000000003"):
        store.load(like=at(0), step=3)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "environment.json"]
)
def test_a_damaged_newest_is_put_aside_with_a_warning_and_the_older_one_taken(tmp_path, name):
    store = filled(tmp_path, [1, 2])
    flip(store.path(2) / name)
    with pytest.warns(
        DamagedCheckpointWarning, match=r"It was renamed to \.corrupt-step-000000000002"
    ) as caught:
        assert store.load(like=at(0)).step == 1
    assert name in str(caught[0].message)
    assert listed(tmp_path) == [".corrupt-step-000000000002", "step-000000000001"]
    store.save(at(2))
    flip(store.path(2) / name)
    with pytest.warns(DamagedCheckpointWarning, match=r"renamed to \.corrupt-step-000000000002-1"):
        assert store.load(like=at(0)).step == 1


def test_a_damaged_step_that_was_asked_for_is_an_error_and_stays_where_it_is(tmp_path):
    store = filled(tmp_path, [1, 2])
    flip(store.path(2) / "model.safetensors")
    with pytest.raises(CheckpointDamagedError, match="its bytes have changed") as e:
        store.load(like=at(0), step=2)
    assert e.value.exit_code == 3
    assert store.steps() == [1, 2]


def set_aside(store, step):
    """As a kill between the two renames of a replacement leaves it."""
    return store.path(step).rename(store.directory / f".old-{store.path(step).name}")


def test_one_that_a_crash_left_set_aside_is_found_deleted_and_replaced_as_any_other(tmp_path):
    """Also where it is the only one, and nobody has swept: never from scratch in silence."""
    store = filled(tmp_path, [1])
    set_aside(store, 1)
    assert (store.steps(), store.load(like=at(0)).step) == ([1], 1)
    assert store.newest().digest == checkpoint.digest(at(1))
    store.save(at(2))
    set_aside(store, 2)
    store.save(at(2, seed=1))
    require_same(store.load(like=at(0)), at(2, seed=1), "the later one")
    for step in (3, 4, 5):
        store.save(at(step))
    assert listed(tmp_path) == [f"step-{step:012d}" for step in (3, 4, 5)]
    flip(set_aside(store, 5) / "state.json")
    with pytest.warns(DamagedCheckpointWarning, match=r"It was renamed to \.corrupt-step-000000000005\."):
        assert store.load(like=at(0)).step == 4
    assert store.steps() == [3, 4]


def test_damaged_checkpoints_alone_do_not_mean_beginning_anew(tmp_path):
    """Never silently from scratch."""
    store = filled(tmp_path, [1, 2])
    for step in (1, 2):
        flip(store.path(step) / "state.json")
    with (
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(CheckpointDamagedError, match=r"None of the 2 checkpoints in .* verifies"),
    ):
        store.load(like=at(0))


def test_names_that_are_not_steps_are_left_alone(tmp_path):
    store = filled(tmp_path, [1])
    for name in ("step-2", "step-000000000003.bak", "step-0000000000004", "best", ".tmp-000000000009-1"):
        (tmp_path / name).mkdir()
    assert store.steps() == [1]


@given(st.lists(st.integers(0, 30) | st.sampled_from([9_900, 10_000]), min_size=1, max_size=8), st.data())
def test_retention_keeps_the_newest_and_the_best(steps, data):
    """As a model: of what was saved, the ``keep`` highest steps and the best one are there."""
    fs, keep = MemoryFs(), data.draw(st.integers(2, 4), label="keep")
    store, model, best = filled("/c", [], keep=keep, fs=fs), set(), None
    for step in steps:
        if data.draw(st.booleans(), label="is best"):
            best = step
        store.save(at(step, best=best))
        model.add(step)
        kept = {*sorted(model)[-keep:], *({best} & model)}
        model = kept
        assert store.steps() == sorted(model)
        assert [name for name in fs.names(Path("/c")) if name.startswith(".")] == []


def test_the_best_can_be_said_by_the_caller(tmp_path):
    store = filled(tmp_path, [], keep=2)
    for step in range(1, 6):
        store.save(at(step), best=step == 2)
    assert store.steps() == [2, 4, 5]


def test_a_save_that_fails_deletes_nothing(tmp_path, monkeypatch):
    """Whichever operation fails from some point on: what was good before is there, and room is made by nobody."""
    monkeypatch.setattr(commit_module, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # the disk is not what is tested
    saving = FaultyFs(0)
    write_collected(saving, tmp_path / "one", collect(at(3)), CPU, overwrite=True)
    for nth in range(1, saving.count + 1):
        filled(tmp_path / str(nth), [1, 2], keep=2)
        store = CheckpointStore(tmp_path / str(nth), keep=2, fs=FaultyFs(nth, sticky=True))
        with pytest.raises(CheckpointWriteError):
            store.save(at(3))
        assert store.steps()[:2] == [1, 2]


def test_an_older_one_is_deleted_only_once_the_new_one_would_outlive_a_power_loss():
    """In the order of the operations: a power loss may come between any two."""
    fs = MemoryFs()
    store = filled("/c", [1, 2], keep=2, fs=fs)
    fs.journal.clear()
    store.save(at(3))
    named = fs.journal.index(("rename", f"/c/.tmp-000000000003-{os.getpid()}", "/c/step-000000000003"))
    hidden = next(n for n, entry in enumerate(fs.journal) if entry[:2] == ("rename", "/c/step-000000000001"))
    assert ("syncdir", "/c") in fs.journal[named:hidden]
    assert fs.journal[:hidden].count(("syncdir", "/c")) == 1
    assert store.steps() == [2, 3]


def test_whoever_is_told_of_a_new_one_finds_the_older_ones_still_there(tmp_path):
    """So what has been told is never of one that is gone."""
    for background in (False, True):
        told, folder = [], tmp_path / str(background)
        store = CheckpointStore(
            folder,
            keep=2,
            background=background,
            on_saved=lambda path, told=told: told.append(listed(path.parent)),
        )
        store.prepare()
        for step in (1, 2, 3):
            store.save(at(step))
        store.wait()
        assert told == [[f"step-{step:012d}" for step in range(1, last + 1)] for last in (1, 2, 3)]
        assert store.steps() == [2, 3]


def test_a_kill_while_deleting_leaves_no_half_of_a_checkpoint(tmp_path):
    store = filled(tmp_path, [1, 2, 3], keep=3)
    operations = FaultyFs(0)
    discard(operations, store.path(1))
    store.save(at(1))
    for nth in range(1, operations.count + 1):
        store.save(at(1))
        with contextlib.suppress(OSError):
            discard(FaultyFs(nth, sticky=True), store.path(1))
        if 1 in store.steps():
            assert store.load(like=at(0), step=1).step == 1
        assert store.prepare() == [name for name in [f".trash-step-000000000001-{os.getpid()}"] if nth > 1]


@pytest.mark.parametrize("keep", [0, 1, 2.0, None])
def test_a_single_checkpoint_is_too_few(keep):
    with pytest.raises(
        ConfigError, match=r"keep must be an int >= 2, but is .* a single checkpoint that is damaged"
    ):
        CheckpointStore("x", keep=keep)


def test_the_same_step_is_replaced(tmp_path):
    store = filled(tmp_path, [])
    store.save(at(5, seed=0))
    store.save(at(5, seed=1))
    require_same(store.load(like=at(0)), at(5, seed=1), "the later one")
    assert listed(tmp_path) == ["step-000000000005"]


def test_several_states_bear_the_step_of_the_first(tmp_path):
    store = filled(tmp_path, [])
    store.save({"g": at(3), "d": at(15)})
    assert store.steps() == [3]
    assert store.load(like={"g": at(0), "d": at(0)})["d"].step == 15


# -- in the background ----------------------------------------------------------------------------------------------


class GatedFs:
    """The real files; writing waits until the gate is opened."""

    def __init__(self):
        self.gate, self.started = threading.Event(), threading.Event()

    def __getattr__(self, name):
        return getattr(LOCAL, name)

    def create(self, path):
        self.started.set()
        assert self.gate.wait(30)
        return LOCAL.create(path)


def test_a_background_save_holds_the_values_of_the_moment_it_was_asked_for(tmp_path):
    """Training goes on in place while the file is written."""
    batches, fs = make_batches(6), GatedFs()
    state = make_state(0)
    with BackgroundSaver(fs=fs) as saver:
        for number, batch in enumerate(batches):
            state = train_step(state, batch)
            if number == 2:
                expected = checkpoint.digest(state)
                saver.save(state, tmp_path / "a")
                assert fs.started.wait(30)
        assert saver.busy
        assert not (tmp_path / "a").exists()
        fs.gate.set()
        assert saver.wait() == expected
    assert not saver.busy
    assert (
        checkpoint.digest(checkpoint.load(tmp_path / "a", like=make_state(1)))
        == expected
        != checkpoint.digest(state)
    )


def test_the_snapshot_keeps_layouts_and_reuses_its_memory(tmp_path):
    """Later saves copy into memory that is there already; a new tensor or another layout gets its own."""
    state = make_state(0)
    with BackgroundSaver() as saver:
        memory = []
        for number, batch in enumerate(make_batches(3)):
            state = train_step(state, batch)
            saver.save(state, tmp_path / str(number))
            assert saver.wait() == checkpoint.digest(state)
            memory.append({key: tensor.data_ptr() for key, tensor in saver._kept.items()})
        assert memory[0] == memory[1] == memory[2]
        assert checkpoint.save(state, tmp_path / "sync") == saver.wait()


def test_the_next_save_waits_for_the_last(tmp_path):
    fs = GatedFs()
    saver = BackgroundSaver(fs=fs)
    saver.save(at(1), tmp_path / "1")
    assert fs.started.wait(30)
    opener = threading.Timer(0.05, fs.gate.set)
    opener.start()
    saver.save(at(2), tmp_path / "2")
    assert (tmp_path / "1").exists()
    saver.wait()
    opener.join()
    assert listed(tmp_path) == ["1", "2"]


def test_a_failure_in_the_background_reaches_the_loop_as_an_error(tmp_path):
    """By the next save, by wait, or at the end of the block; once; and the save that it interrupts is not begun."""
    saver = BackgroundSaver()
    saver.save(at(1), tmp_path / "missing" / "a")
    with pytest.raises(CheckpointWriteError, match="No such file or directory"):
        saver.save(at(2), tmp_path / "b")
    assert listed(tmp_path) == []
    saver.save(at(2), tmp_path / "b")
    assert saver.wait() == checkpoint.digest(at(2))
    with pytest.raises(CheckpointWriteError, match="No such file"), saver:
        saver.save(at(3), tmp_path / "missing" / "a")


def test_an_error_on_its_way_is_not_hidden_by_that_of_a_save(tmp_path):
    def loop():
        with BackgroundSaver() as saver:
            saver.save(at(1), tmp_path / "missing" / "a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def test_what_cannot_be_saved_is_refused_by_the_call_itself(tmp_path):
    saver = BackgroundSaver()
    state = at(1)
    with pytest.raises(CheckpointUnsupportedError):
        saver.save(state.replace(hyper=({**state.hyper[0], "hook": print},)), tmp_path / "a")
    assert saver.wait() is None


def test_a_store_in_the_background_prunes_after_each_commit(tmp_path):
    store = filled(tmp_path, [], keep=2, background=True)
    for step in range(1, 6):
        store.save(at(step), best=step == 1)
    store.wait()
    assert store.steps() == [1, 4, 5]
    (tmp_path / "step-000000000006").write_bytes(b"")
    store.save(at(6))
    with pytest.raises(CheckpointWriteError, match="could not be put in place"):
        store.wait()
    store.wait()


def test_reading_a_store_warns_of_nothing_while_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = filled(tmp_path, [1, 2, 3])
        require_same(store.load(like=at(0)), at(3), "the newest")
        assert store.newest().directory == Path(tmp_path / "step-000000000003")
