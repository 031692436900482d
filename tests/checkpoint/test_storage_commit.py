"""The commit protocol under power loss, faults, litter, and what is probed beforehand."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import FaultyFs, MemoryFs, after_power_loss, listed, make_linear

from steploop import checkpoint
from steploop.checkpoint.loading import open_checkpoint
from steploop.checkpoint.packing import collect
from steploop.checkpoint.saving import write_collected
from steploop.checkpoint.storage.commit import commit, find
from steploop.checkpoint.storage.litter import discard, make_directories, probe, sweep
from steploop.checkpoint.storage.local import LOCAL
from steploop.errors import CheckpointDamagedError, CheckpointUnsupportedError, CheckpointWriteError

CPU = torch.device("cpu")
OLD = {"a": b"old a" * 9, "b": b"old b"}


def save_journal(start, target, *, overwrite=False):
    """The real save of a real state, as a journal of operations; and what it made."""
    fs = MemoryFs(start)
    write_collected(fs, Path(target), collect(make_linear()), CPU, overwrite=overwrite)
    return fs.journal, fs.tree()


def violations(start, journal, target, old, new, cases):
    """The cases in which a power loss leaves neither what was there nor what was saved, or loses what was promised."""
    rng = random.Random(0)
    for case in range(cases):
        end = len(journal) if case % 2 else rng.randrange(len(journal) + 1)
        survived = after_power_loss(start, journal[:end], rng)
        fs = MemoryFs(survived)
        if rng.random() < 0.5:
            sweep(fs, Path("/"), alive=lambda pid: False)
            survived = fs.tree()
        visible = survived.get(target)
        if visible is not None and visible not in (new, old):
            yield case  # visible, and not whole
        elif end == len(journal):
            if visible != new:  # save() had returned
                yield case
        elif old is not None:
            if survived.get(str(find(fs, Path(target)))) not in (new, old):
                yield case
        elif survived.get("/old") != OLD:
            yield case


@pytest.mark.parametrize("cases", [2_000, pytest.param(100_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_a_power_loss_leaves_the_old_or_the_new_checkpoint(replacing, cases, monkeypatch):
    """At any moment one of them is there whole; once save() has returned, the new one."""
    target, old = ("/old", OLD) if replacing else ("/step-000000000002", None)
    monkeypatch.setattr("steploop.checkpoint.saving.environment_bytes", lambda device: b"{}")
    journal, made = save_journal({"/old": OLD}, target, overwrite=replacing)
    assert list(violations({"/old": OLD}, journal, target, old, made[target], cases)) == []


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_every_flush_of_a_save_is_needed(replacing, monkeypatch):
    """With any one flush left out, the same model of a power loss finds a loss."""
    target, old = ("/old", OLD) if replacing else ("/step-000000000002", None)
    monkeypatch.setattr("steploop.checkpoint.saving.environment_bytes", lambda device: b"{}")
    journal, made = save_journal({"/old": OLD}, target, overwrite=replacing)
    flushes = [i for i, (operation, *_) in enumerate(journal) if operation in {"sync", "syncdir"}]
    assert len(flushes) == 6  # four files, their directory, the parent
    for i in flushes:
        mutant = journal[:i] + journal[i + 1 :]
        assert any(True for _ in violations({"/old": OLD}, mutant, target, old, made[target], 10_000)), (
            journal[i]
        )


def test_a_checkpoint_that_survives_a_power_loss_loads():
    journal, made = save_journal({}, "/step-000000000001")
    survived = after_power_loss({}, journal, random.Random(0))
    assert survived == made
    found = open_checkpoint(Path("/step-000000000001"), fs=MemoryFs(survived))
    assert found.digest == checkpoint.digest(make_linear())


def failure_of(act, *arguments, **options):
    """The CheckpointWriteError that ``act`` raises, or None."""
    try:
        act(*arguments, **options)
    except CheckpointWriteError as error:
        return error
    return None


def count_operations(tmp_path):
    fs = FaultyFs(0)
    write_collected(fs, tmp_path / "count", collect(make_linear()), CPU, overwrite=True)
    return fs.count


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_one_failing_operation_is_tried_again_from_nothing_or_reported(tmp_path, number):
    """Each operation of a save fails once: the save succeeds on another try, or raises with the errno."""
    state, operations = make_linear(), count_operations(tmp_path)
    expected = checkpoint.digest(state)
    for nth in range(1, operations + 1):
        fs, target = FaultyFs(nth, number=number), tmp_path / f"once-{number}-{nth}"
        failed = failure_of(write_collected, fs, target, collect(state), CPU, overwrite=False, wait_s=0)
        if failed is not None:
            assert failed.errno == number
            assert f"injected into {fs.failed[0]}" in str(failed)
            assert fs.failed[0] in {"rename", "sync_directory"}
        if target.exists():
            assert open_checkpoint(target).digest == expected
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_operation_that_keeps_failing_leaves_what_was_there(tmp_path):
    """From the n-th operation on nothing works, cleaning up included: the old checkpoint is there, or the new one."""
    before, after = make_linear(0), make_linear(1)
    digests = {checkpoint.digest(before), checkpoint.digest(after)}
    for nth in range(1, count_operations(tmp_path) + 3):
        target = tmp_path / f"sticky-{nth}"
        checkpoint.save(before, target)
        fs = FaultyFs(nth, sticky=True)
        failed = failure_of(write_collected, fs, target, collect(after), CPU, overwrite=True, wait_s=0)
        assert failed is None or failed.errno == errno.EIO
        assert open_checkpoint(target).digest in digests
        sweep(LOCAL, tmp_path, alive=lambda pid: False)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        assert open_checkpoint(target).digest in digests


def test_a_failed_flush_is_not_repeated_on_the_same_file(tmp_path):
    """After a failed fsync the pages may be gone though the next one succeeds: everything is written again."""
    fs = FaultyFs(1, within=lambda operation: operation == "sync")
    created = []
    original = fs.__getattr__

    class Watching:
        def __getattr__(self, name):
            if name == "create":
                created.append(name)
            return original(name)

    write_collected(Watching(), tmp_path / "a", collect(make_linear()), CPU, overwrite=False, wait_s=0)
    assert len(created) == 1 + 4


def test_a_failed_last_flush_is_told_and_the_checkpoint_is_whole(tmp_path):
    """The directory is visible but not certainly durable: the error says so, the next start accepts it."""
    fs = FaultyFs(2, within=lambda operation: operation == "sync_directory")
    with pytest.raises(
        CheckpointWriteError, match="visible and whole, but it is not certain that it would outlive"
    ):
        write_collected(fs, tmp_path / "a", collect(make_linear()), CPU, overwrite=False)
    assert open_checkpoint(tmp_path / "a").digest == checkpoint.digest(make_linear())


def test_hopeless_errors_are_not_tried_again(tmp_path):
    """A missing directory does not appear by waiting."""
    with pytest.raises(
        CheckpointWriteError, match=r"could not be written \(try 1 of 3\): No such file or directory"
    ) as e:
        checkpoint.save(make_linear(), tmp_path / "missing" / "a")
    assert e.value.errno == errno.ENOENT


def test_an_existing_checkpoint_is_not_overwritten_unasked(tmp_path):
    checkpoint.save(make_linear(0), tmp_path / "a")
    with pytest.raises(
        CheckpointWriteError, match="exists already: choose another name, or pass overwrite=True"
    ) as e:
        checkpoint.save(make_linear(1), tmp_path / "a")
    assert e.value.errno == errno.EEXIST
    assert open_checkpoint(tmp_path / "a").digest == checkpoint.digest(make_linear(0))
    assert checkpoint.save(make_linear(1), tmp_path / "a", overwrite=True) == checkpoint.digest(
        make_linear(1)
    )
    assert open_checkpoint(tmp_path / "a").digest == checkpoint.digest(make_linear(1))
    assert listed(tmp_path) == ["a"]


def test_a_name_that_marks_unfinished_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointWriteError, match="its name must not begin with a dot"):
        checkpoint.save(make_linear(), tmp_path / ".tmp-a")


def test_any_other_exception_leaves_nothing_behind(tmp_path):
    """A dying data worker makes torch raise RuntimeError at any line of the main thread, this one too."""

    def write(directory):
        (directory / "half").write_bytes(b"x")
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        commit(LOCAL, tmp_path / "a", write)
    assert listed(tmp_path) == []


def test_a_replacement_cut_off_between_its_two_renames_is_found_and_recovered(tmp_path):
    checkpoint.save(make_linear(), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".old-a")
    assert open_checkpoint(tmp_path / "a").digest == checkpoint.digest(make_linear())
    assert sweep(LOCAL, tmp_path) == [".old-a"]
    assert listed(tmp_path) == ["a"]


def test_a_save_after_such_a_cut_keeps_the_old_one_until_the_new_one_is_there(tmp_path):
    checkpoint.save(make_linear(0), tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / ".old-a")
    fs = FaultyFs(1, sticky=True, within=lambda operation: operation == "rename")
    with pytest.raises(CheckpointWriteError, match="could not be put in place"):
        write_collected(fs, tmp_path / "a", collect(make_linear(1)), CPU, overwrite=True)
    assert open_checkpoint(tmp_path / "a").digest == checkpoint.digest(make_linear(0))
    checkpoint.save(make_linear(1), tmp_path / "a", overwrite=True)
    assert listed(tmp_path) == ["a"]


def test_litter_of_dead_processes_is_swept_and_that_of_living_ones_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent = os.getppid()
    for name in (
        f".tmp-5-{dead.pid}",
        f".tmp-6-{parent}",
        f".tmp-7-{os.getpid()}",
        f".trash-a-{parent}",
        "kept",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    swept = sweep(LOCAL, tmp_path)
    assert sorted(swept) == sorted([f".tmp-5-{dead.pid}", f".tmp-7-{os.getpid()}", f".trash-a-{parent}"])
    assert listed(tmp_path) == sorted([f".tmp-6-{parent}", "kept"])


def test_sweeping_removes_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "run" / f".tmp-1-{2**31 - 2}").mkdir(parents=True)
    (tmp_path / "run" / f".tmp-1-{2**31 - 2}" / "link").symlink_to(tmp_path / "precious")
    sweep(LOCAL, tmp_path / "run")
    assert listed(tmp_path / "run") == []
    assert (tmp_path / "precious" / "file").exists()


def test_deleting_hides_a_checkpoint_before_it_takes_it_apart():
    """A kill on the way leaves no half of it under its name."""
    fs = MemoryFs({"/step": {"a": b"1", "b": b"2"}})
    discard(fs, Path("/step"))
    assert fs.tree() == {}
    assert fs.journal[0][0] == "rename"


AS_NOBODY = """
import os, sys
from pathlib import Path
from steploop.checkpoint.storage.local import LOCAL
from steploop.checkpoint.storage.litter import make_directories, probe
from steploop.errors import CheckpointWriteError
if os.getuid() == 0:
    os.setuid(65534)
for act, path in ((probe, sys.argv[1]), (make_directories, sys.argv[1] + "/new")):
    try:
        act(LOCAL, Path(path))
    except CheckpointWriteError as error:
        print(error.exit_code, error.errno, error)
"""


def test_a_directory_that_cannot_be_written_is_found_by_the_probe(tmp_path):
    """Read-only, by a process that is not root."""
    closed = tmp_path / "closed"
    closed.mkdir()
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        if os.getuid() == 0:
            parent.chmod(parent.stat().st_mode | 0o055)
    closed.chmod(0o555)
    out = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(closed)], capture_output=True, text=True, check=True
    )
    lines = out.stdout.splitlines()
    assert lines[0] == (
        f"4 {errno.EACCES} Checkpoints cannot be written to {closed}. Choose a directory on a local disk that this user "
        "may write to and that has room: Permission denied"
    )
    assert lines[1].startswith(f"4 {errno.EACCES} The directory {closed}/new cannot be created.")


def test_the_probe_finds_what_is_missing_no_directory_or_full(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, number in ((tmp_path / "missing", errno.ENOENT), (tmp_path / "file", errno.ENOTDIR)):
        with pytest.raises(CheckpointWriteError, match="cannot be written to") as e:
            probe(LOCAL, path)
        assert e.value.errno == number
    probe(LOCAL, tmp_path)
    fs = FaultyFs(0)
    probe(fs, tmp_path)
    for nth in range(1, fs.count + 1):
        with pytest.raises(CheckpointWriteError) as e:
            probe(FaultyFs(nth, number=errno.EDQUOT), tmp_path)
        assert e.value.errno == errno.EDQUOT
        sweep(LOCAL, tmp_path)
        assert listed(tmp_path) == ["file"]


def test_made_directories_are_durable():
    """Each new directory's name is flushed in the one above it, before anything depends on it."""
    fs = MemoryFs({"/run": {}})
    make_directories(fs, Path("/run/a/b"))
    assert fs.journal == [
        ("mkdir", "/run/a"),
        ("syncdir", "/run"),
        ("mkdir", "/run/a/b"),
        ("syncdir", "/run/a"),
    ]


def test_modes_follow_the_umask_and_everything_stays_on_one_file_system(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        checkpoint.save(make_linear(), tmp_path / "link" / "a")
    finally:
        os.umask(before)
    made = tmp_path / "real" / "a"
    assert stat.S_IMODE(made.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in made.iterdir()} == {0o640}
    assert {p.stat().st_dev for p in made.iterdir()} == {tmp_path.stat().st_dev}
    assert open_checkpoint(tmp_path / "link" / "a").digest == checkpoint.digest(make_linear())


def test_short_writes_and_reads_change_nothing(tmp_path, monkeypatch):
    """The system may take or give less than it was asked for."""
    checkpoint.save(make_linear(), tmp_path / "whole")
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
    checkpoint.save(make_linear(), tmp_path / "short")
    assert open_checkpoint(tmp_path / "short").digest == checkpoint.digest(make_linear())
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_signals_that_interrupt_system_calls_change_nothing(tmp_path):
    """A handler of somebody's own runs every tenth of a millisecond while files are written and read."""
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    state = make_linear()
    checkpoint.save(state, tmp_path / "calm")
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for _ in range(20):
            checkpoint.save(state, tmp_path / "shaken", overwrite=True)
            assert open_checkpoint(tmp_path / "shaken").digest == checkpoint.digest(state)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 20
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (tmp_path / "shaken" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()
    assert listed(tmp_path) == ["calm", "shaken"]


def test_what_cannot_be_saved_is_refused_before_any_file_exists(tmp_path):
    state = make_linear()
    state = state.replace(hyper=({**state.hyper[0], "hook": print},))
    with pytest.raises(CheckpointUnsupportedError, match=r"hyper\.0\.hook is a builtin_function_or_method"):
        checkpoint.save(state, tmp_path / "a")
    assert listed(tmp_path) == []


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointDamagedError, match=r"There is no checkpoint .*missing\. Name a directory"):
        open_checkpoint(tmp_path / "missing")
