"""What befalls a run: kills, disks, litter, the best one, and workers that die.

What these would catch: a save that the run waits for in the wrong place, an error of the saving thread that becomes a log
line, a store that prunes before it has saved, a sweep that takes what belongs to somebody who lives.
"""

import collections
import errno
import json
import os
import random
import signal
import time
import types
import warnings
from pathlib import Path

import attrs
import pytest
from points_recipe import Points
from running import (
    POINTS,
    Forked,
    changed,
    digest,
    hidden,
    kept,
    lines,
    running,
    steps,
    train,
    wait_until,
)

from steploop.checkpoint import CheckpointStore
from steploop.checkpoint.storage import commit as commit_module
from steploop.checkpoint.storage.commit import find
from steploop.checkpoint.storage.local import LOCAL, LocalFs
from steploop.data.order import epoch_order
from steploop.errors import DataError
from steploop.runs.directory import Status, make_directory
from steploop.tools.cli import call

QUICK = ["--no-tune", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """An uninterrupted run, and the digests of all the checkpoints that it made."""
    out, seen = tmp_path_factory.mktemp("golden") / "run", collections.defaultdict(set)

    def look(_):
        for step, found in kept(out).items():
            seen[step].add(found)  # two where a step was skipped, which moves the loss scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(CheckpointStore, "_prune", look)
        train(out, checkpoint_every=1)
    assert sorted(seen) == list(range(1, len(seen) + 1))  # by the steps applied
    return out, seen


def gone(out):
    """The checkpoints that status.json names and that are not there, under their names or set aside for a newer one."""
    status = json.loads((out / "status.json").read_bytes())
    told = [status[key] for key in ("checkpoint", "best_checkpoint") if key in status]
    return [name for name in told if not find(LOCAL, out / "checkpoints" / name).is_dir()]


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_again_and_again_loses_nothing_that_was_saved(golden, tmp_path):
    """Through ``steploop run`` and ``resume``: at each start the newest checkpoint is whole and no older than before."""
    whole, digests = golden
    out, rng, kills, newest = tmp_path / "run", random.Random(0), 0, 0
    words = [*QUICK, "--checkpoint-every", "1", "--set", "step_s=0.05"]
    command = ["run", POINTS, "--out", str(out), *words]
    for _ in range(100):
        child = Forked(tmp_path, *command)
        if rng.random() < 0.8:  # the others die while they are starting
            wait_until(
                lambda pid=child.pid, before=newest: not running(pid) or max(steps(out), default=0) > before
            )
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        assert code in {0, -signal.SIGKILL}, child.err.read_text()
        kills += code != 0
        if (out / "checkpoints").is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a damaged checkpoint would be a warning
                found = CheckpointStore(out / "checkpoints").newest()
            step = 0 if found is None else int(found.directory.name[5:])
            assert found is None or found.digest in digests[step]
            assert step >= newest
            newest = step
            assert gone(out) == []
        if code == 0 or newest == len(digests):
            break
        if (out / "config.json").is_file():
            command = ["resume", str(out), "--quiet"]
    else:
        pytest.fail("it never came to an end")
    assert kills > 3
    train(out, resume=True)
    assert hidden(out) == []
    assert digest(out) == digest(whole)


@pytest.mark.parametrize("flush", range(1, 13))
def test_a_start_that_is_killed_needs_nobody_to_clear_up_after_it(
    flush, golden, tmp_path, monkeypatch, capsys
):
    """Before its record is written, between the record and the recipe's copy, before the first checkpoint, in it."""
    whole, _ = golden
    out, fsync, left = tmp_path / "run", os.fsync, [flush]
    words = ["run", POINTS, "--out", str(out), *QUICK, "--log-every", "1", "--checkpoint-every", "3"]

    def killing(fd):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killing)
        child = Forked(tmp_path, *words)
        assert child.end()[0] == -signal.SIGKILL
    recorded = (out / "config.json").exists()
    assert recorded == (flush > 1)
    assert call(["resume", str(out), "--quiet"] if recorded else words) == 0, capsys.readouterr().err
    assert digest(out) == digest(whole)
    assert [line["attempted"] for line in lines(out) if line["kind"] == "train"] == list(range(1, 15))
    assert (out / "recipe.py").read_bytes() == Path(POINTS).read_bytes()
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_kill_while_a_checkpoint_takes_the_place_of_one_of_its_step_costs_none(
    epoch, golden, tmp_path, monkeypatch
):
    """The older one is set aside for a moment, and may be the only one: it is gone on with."""
    whole, _ = golden
    out, rename, left = tmp_path / "run", LocalFs.rename, [epoch]

    def killing(self, source, target):
        left[0] -= find(LOCAL, target) != target
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, source, target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFs, "rename", killing)
        child = Forked(tmp_path, "run", POINTS, "--out", str(out), *QUICK, "--log-every", "1")
        assert child.end()[0] == -signal.SIGKILL
    assert steps(out) == [7] * (epoch - 1)
    assert gone(out) == []
    train(out, resume=True)
    resumed = [line["attempted"] for line in lines(out) if line.get("event") == "resumed"]
    assert resumed == [7 * epoch]
    assert digest(out) == digest(whole)


@pytest.mark.parametrize("content", [None, b"", b'{"state": "runn', bytes(100)], ids=repr)
def test_a_status_or_a_log_that_a_power_loss_spoilt_keeps_nobody_from_going_on(
    content, golden, tmp_path, capsys
):
    """For the files beside the checkpoints: no step depends on them."""
    whole, _ = golden
    out = tmp_path / "run"
    train(out, stop_at=9)
    if content is None:
        (out / "status.json").unlink()
    else:
        (out / "status.json").write_bytes(content)
        with (out / "metrics.jsonl").open("ab") as file:
            file.write(content + b"\n[]\n\xff\n")
    assert call(["status", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["resume"]) == ("died", True)
    assert call(["resume", str(out), "--quiet"]) == 0
    assert digest(out) == digest(whole)
    assert [line["attempted"] for line in lines(out) if line["kind"] == "train"] == list(range(1, 15))


# -- disks ------------------------------------------------------------------------------------------------------------


def failing(monkeypatch, operation, number, *, after=0):
    """Let one operation on the files of checkpoints fail with an ``errno``, from the call ``after`` that many on."""
    real, calls = getattr(LocalFs, operation), []

    def call_or_fail(self, path, *rest):
        if "probe" not in str(path) or after == 0:
            calls.append(path)
            if len(calls) > after:
                raise OSError(number, os.strerror(number), str(path))
        return real(self, path, *rest)

    monkeypatch.setattr(LocalFs, operation, call_or_fail)
    waited = []
    monkeypatch.setattr(commit_module, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


# what five saves need, with the run's record and their directory made before, and two of them deleted again
@pytest.mark.parametrize(
    ("operation", "number", "after", "waited"),
    [
        ("create", errno.ENOSPC, 4 * 5, [0.5, 1.0]),
        ("create", errno.EDQUOT, 4 * 5 + 3, [0.5, 1.0]),
        ("make_directory", errno.ENOSPC, 1 + 5, [0.5, 1.0]),
        ("rename", errno.EIO, 5 + 2, []),
        ("sync_directory", errno.EIO, 4 + 2 * 5, [0.5, 1.0]),
        (
            "sync_directory",
            errno.EIO,
            4 + 2 * 4 + 1,
            [],
        ),  # of the directory of all of them: the fifth is visible
    ],
)
def test_a_disk_that_fails_ends_the_run_with_code_4_and_costs_no_checkpoint(
    operation, number, after, waited, golden, tmp_path, monkeypatch, capsys
):
    """Three tries where waiting may help; what was saved stays, nothing half written does; then the run goes on."""
    whole, digests = golden
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        waits = failing(patch, operation, number, after=after)
        assert call(["run", POINTS, "--out", str(out), *QUICK, "--checkpoint-every", "1"]) == 4
    assert waits == waited
    err = capsys.readouterr().err
    assert err.startswith("steploop: ")
    assert os.strerror(number) in err
    assert len(err.splitlines()) == 1
    status = json.loads((out / "status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert hidden(out) == []
    assert steps(out)[-1] == 5
    assert len(steps(out)) >= 2
    assert all(found in digests[step] for step, found in kept(out).items())
    assert call(["resume", str(out), "--quiet"]) == 0
    assert digest(out) == digest(whole)


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("make_directory", errno.EROFS),
        ("make_directory", errno.EACCES),
        ("create", errno.EDQUOT),
        ("create", errno.ENOSPC),
        ("rename", errno.EXDEV),
        ("sync_directory", errno.EINVAL),
    ],
)
def test_a_directory_that_takes_no_checkpoint_is_found_before_the_first_step(
    operation, number, tmp_path, monkeypatch, capsys
):
    """Not at the end of the first epoch."""
    failing(monkeypatch, operation, number)
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), *QUICK, "--log-every", "1"]) == 4
    assert os.strerror(number) in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or lines(tmp_path / "run") == []


def test_a_place_where_nobody_may_write_is_found_before_the_first_step(capsys):
    """Not even root may."""
    assert call(["run", POINTS, "--out", "/proc/run", *QUICK]) == 4
    assert "/proc/run cannot be written" in capsys.readouterr().err


# -- litter and retention ---------------------------------------------------------------------------------------------


def test_a_start_clears_what_dead_processes_left_and_nothing_else(golden, tmp_path):
    whole, _ = golden
    train(tmp_path / "run", stop_at=3)
    checkpoints = tmp_path / "run" / "checkpoints"
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    names = [
        f".tmp-000000000009-{dead}",
        f".tmp-000000000009-{os.getppid()}",
        f".trash-step-000000000001-{dead}",
    ]
    for name in names:
        (checkpoints / name).mkdir()
        (checkpoints / name / "model.safetensors").write_bytes(b"half")
    train(tmp_path / "run", resume=True)
    assert hidden(tmp_path / "run") == [f".tmp-000000000009-{os.getppid()}"]
    assert digest(tmp_path / "run") == digest(whole)


def test_the_newest_three_and_the_best_are_kept(tmp_path):
    """The best one is that of the second evaluation, which four later ones do not displace."""
    trial = [3.0]  # before the first step
    values = iter([*trial, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    recipe = changed(tmp_path, lambda made, _: attrs.evolve(made, evaluate=lambda _: {"loss": next(values)}))
    train(tmp_path / "run", {"epochs": "6", "precision": "fp32"}, recipe=recipe)
    assert steps(tmp_path / "run") == [14, 28, 35, 42]
    status = json.loads((tmp_path / "run" / "status.json").read_bytes())
    assert status["best_checkpoint"] == "step-000000000014"


def test_runs_that_begin_at_once_get_directories_of_their_own(tmp_path, monkeypatch):
    """Each of them has looked before the others made theirs: a number is whose ``mkdir`` made it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [])
    made = [make_directory(None, "points") for _ in range(3)]
    assert [directory.path.name for directory in made] == ["points-1", "points-2", "points-3"]


LOSSES = [3.0, 1.0, 2.0, 0.5, 2.0, 2.0, 2.0]  # of the seven evaluations of a run of six epochs


def judged(recipe, _):
    """Evaluations that are the better the lower ``LOSSES`` has them."""
    return attrs.evolve(recipe, evaluate=lambda state: {"loss": LOSSES[state.attempted_steps // 7]})


def test_what_the_status_names_is_there_at_any_moment(tmp_path, monkeypatch):
    """Whoever reads it while the run goes on, or after a kill: after each operation on the files of checkpoints."""
    out, seen = tmp_path / "run", []

    def looking(real):
        def operation(self, *paths):
            real(self, *paths)
            if (out / "status.json").exists():
                seen.append(gone(out))

        return operation

    for name in ("rename", "unlink", "remove_directory", "sync_directory"):
        monkeypatch.setattr(LocalFs, name, looking(getattr(LocalFs, name)))
    train(out, {"epochs": "6", "precision": "fp32"}, recipe=changed(tmp_path, judged), checkpoint_every=3)
    assert len(seen) > 100
    assert not any(seen)


def test_the_best_one_is_named_though_a_kill_came_before_it_was(tmp_path, monkeypatch):
    out, update = tmp_path / "run", Status.update

    def killing(self, **values):
        if values.get("best_checkpoint") == "step-000000000021":
            os.kill(os.getpid(), signal.SIGKILL)
        update(self, **values)

    recipe = changed(tmp_path, judged)
    with monkeypatch.context() as patch:
        patch.setattr(Status, "update", killing)
        words = ["run", recipe, "--out", str(out), *QUICK, "--set", "epochs=6", "--set", "precision=fp32"]
        assert Forked(tmp_path, *words).end()[0] == -signal.SIGKILL
    assert gone(out) == []
    train(out, resume=True)
    status = json.loads((out / "status.json").read_bytes())
    assert status["best_checkpoint"] == "step-000000000021"
    assert gone(out) == []


# -- workers ----------------------------------------------------------------------------------------------------------


class Dying(Points):
    """Whoever is asked for one of its samples waits until a save has begun, and then dies or raises in the midst of it."""

    def __init__(self, folder, victim, how):
        super().__init__(28, 1)
        self.folder, self.victim, self.how = folder, victim, how

    def __getitem__(self, index):
        if index == self.victim and (self.folder / "armed").exists():
            wait_until((self.folder / "saving").exists)
            (self.folder / "dying").write_text(str(os.getpid()))
            if self.how == "exits":
                os._exit(3)
            if self.how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("odd sample")
        return super().__getitem__(index)


@pytest.mark.parametrize("how", ["exits", "is killed", "raises"])
def test_a_worker_that_fails_during_a_save_is_named_and_the_save_commits(how, golden, tmp_path, monkeypatch):
    """The error says worker and samples; the checkpoint that was being written is whole, and a resume is exact."""
    whole, digests = golden
    order = epoch_order(28, seed=0, epoch=0).tolist()
    batch, victim = order[8:12], order[9]  # batch 2, which is worker 0's

    def change(recipe, _):
        data = Dying(tmp_path, victim, how)
        return attrs.evolve(recipe, batches=attrs.evolve(recipe.batches, dataset=data, num_workers=2))

    def throttled(self, path):
        if path.name == "model.safetensors" and not (tmp_path / "saving").exists():
            (tmp_path / "saving").touch()
            wait_until(lambda: (tmp_path / "dying").exists() and (tmp_path / "dying").read_text())
            if how != "raises":
                wait_until(lambda: not running((tmp_path / "dying").read_text()))
        return create(self, path)

    create = LocalFs.create
    recipe, out = changed(tmp_path, change), tmp_path / "run"
    (tmp_path / "armed").touch()
    with monkeypatch.context() as patch:
        patch.setattr(LocalFs, "create", throttled)
        with pytest.raises(DataError) as caught:
            train(out, recipe=recipe, checkpoint_every=1)
    said = {
        "exits": f"ended with exit code 3; the first batch that it owed is 2, samples {batch};",
        "is killed": f"was killed by SIGKILL; the first batch that it owed is 2, samples {batch};",
        "raises": f"making batch 2 failed at sample {victim} in worker 0: ValueError: odd sample;",
    }[how]
    assert said in str(caught.value)
    assert how == "raises" or str(caught.value).startswith("data worker 0 (pid ")
    assert hidden(out) == []
    assert steps(out) != []
    assert all(found in digests[step] for step, found in kept(out).items())
    status = json.loads((out / "status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["error"].startswith("DataError: ")
    (tmp_path / "armed").unlink()
    train(out, resume=True)
    assert digest(out) == digest(whole)
