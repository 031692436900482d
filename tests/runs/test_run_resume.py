"""A run that is stopped anywhere and resumed gives, bit for bit, what it would have given uninterrupted.

What these would catch: any field that a checkpoint lacks (patience, scale, averages, slots), a cursor off by one, an order
or an augmentation that depends on who reads or on what was read before, a schedule that counts attempted steps.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import attrs
import pytest
import torch
from points_recipe import Points
from running import POINTS, Forked, StopAtCheck, changed, digest, lines, train

from steploop.tools.cli import call

STEPS = 14  # two epochs of seven batches


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("golden") / "run"
    summary = train(out)
    assert (summary.state, summary.steps_attempted, summary.epoch) == ("finished", STEPS, 2)
    return out


def comparable(out):
    """The log without times, and without the events and extra evaluations of stops."""
    kept = (
        "step",
        "attempted",
        "epoch",
        "batch",
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
        "metrics",
        "best",
    )
    return [{k: line[k] for k in kept if k in line} for line in lines(out) if line["kind"] != "event"]


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_a_run_stopped_after_any_step_ends_in_the_same_state(stop, golden, tmp_path):
    """Through the run's functions: dropout, BatchNorm, augmentation, accumulation, schedule, EMA, scaler."""
    summary = train(tmp_path / "run", stop_at=stop)
    assert (summary.state, summary.exit_code, summary.steps_attempted) == ("interrupted", 75, stop)
    summary = train(tmp_path / "run", resume=True)
    assert (summary.state, summary.exit_code) == ("finished", 0)
    assert digest(tmp_path / "run") == digest(golden)
    assert comparable(tmp_path / "run") == comparable(golden)


def signalled_in(step):
    """A change of a recipe: the process is sent a SIGTERM in the middle of one attempted step."""

    def change(recipe, _):
        def train_step(state, batch):
            if state.attempted_steps == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return recipe.train_step(state, batch)

        return attrs.evolve(recipe, train_step=train_step)

    return change


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_steploop_run_stopped_in_any_step_is_gone_on_with_by_steploop_resume(stop, golden, tmp_path, capsys):
    """Through the command line: a real signal, whose handler is the run's own."""
    recipe, out = changed(tmp_path, signalled_in(stop)), str(tmp_path / "run")
    words = ["--out", out, "--log-every", "1", "--no-tune", "--device", "cpu", "--quiet"]
    assert call(["run", recipe, *words]) == 75
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["state"], summary["steps_attempted"]) == ("interrupted", stop)
    assert call(["resume", out, "--quiet"]) == 0
    assert digest(out) == digest(golden)
    assert comparable(out) == comparable(golden)


RESUME = """
import sys
import torch
from steploop.tools.cli import call
torch.set_num_threads(1)
for out in sys.argv[1:]:
    code = call(["resume", out, "--quiet", "--require-exact"])
    if code:
        sys.exit(code)
"""


def test_a_new_interpreter_with_another_hash_seed_goes_on_to_the_same_state(golden, tmp_path):
    """Nothing that a resume needs is in the memory of the process: stops early, at the end of an epoch, and late."""
    outs = [tmp_path / str(stop) for stop in (2, 7, 12)]
    for out in outs:
        assert train(out, stop_at=int(out.name)).state == "interrupted"
    command = [sys.executable, "-c", RESUME, *map(str, outs)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for out in outs:
        assert digest(out) == digest(golden)
        assert comparable(out) == comparable(golden)


def test_a_copy_of_a_run_directory_goes_on_as_the_run_would_have(golden, tmp_path, monkeypatch):
    """Neither times nor places decide, but the steps that stand in the names; the clock was set back by years."""
    train(tmp_path / "run", stop_at=9, checkpoint_every=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy é ✓")
    for number, path in enumerate(sorted((tmp_path / "copy é ✓" / "checkpoints").iterdir(), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))  # the oldest is the newest by the clock
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for name in ("copy é ✓", "run"):
        train(tmp_path / name, resume=True)
        assert digest(tmp_path / name) == digest(golden)
        assert comparable(tmp_path / name) == comparable(golden)


def test_three_stops_in_one_epoch_repeat_nothing_and_skip_nothing(golden, tmp_path):
    """The first step, the last and one past it are among the stops of a run stopped at every step."""
    train(tmp_path / "run", stop_at=2)
    train(tmp_path / "run", stop_at=3, resume=True)
    train(tmp_path / "run", stop_at=6, resume=True)
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(golden)
    assert [line["attempted"] for line in lines(tmp_path / "run") if line["kind"] == "train"] == list(
        range(1, STEPS + 1)
    )


def test_the_number_of_workers_may_change_at_a_resume(golden, tmp_path):
    train(tmp_path / "run", {"workers": "2"}, stop_at=4)
    train(tmp_path / "run", {"workers": "0"}, resume=True)
    assert digest(tmp_path / "run") == digest(golden)


class Jittered(Points):
    """Samples that are augmented by the worker, out of torch's global generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.05 * torch.randn(x.shape), y


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_workers_prefetching_and_their_persistence_change_neither_batches_nor_augmentations(tmp_path):
    """None, then two that stay and read three batches ahead, then three that do not."""
    reading = {}

    def change(recipe, _):
        data = {"dataset": Jittered(28, 1), "transform": shifted, **reading}
        return attrs.evolve(recipe, batches=attrs.evolve(recipe.batches, **data))

    recipe = changed(tmp_path, change)
    train(tmp_path / "whole", recipe=recipe)
    train(tmp_path / "run", recipe=recipe, stop_at=3)
    reading |= {"num_workers": 2, "prefetch": 3, "persistent_workers": True}
    train(tmp_path / "run", resume=True, stop_at=9)
    reading |= {"num_workers": 3, "prefetch": 1, "persistent_workers": False}
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def shifted(sample, generator):
    x, y = sample
    return x + 0.05 * torch.randn(x.shape, generator=generator), y


@pytest.mark.parametrize(
    "values",
    [
        {"eval_every": 3},
        {"plateau": "yes", "precision": "fp32"},
        {"patience": "1", "learning_rate": "1.5", "epochs": "4"},
        {"phases": "true"},
    ],
    ids=["evaluation within an epoch", "plateau", "early stopping", "two phases"],
)
@pytest.mark.parametrize("stop", [3, 7, 9])
def test_a_resume_continues_every_fold(values, stop, tmp_path):
    whole = train(tmp_path / "whole", values)
    train(tmp_path / "run", values, stop_at=stop)
    resumed = train(tmp_path / "run", resume=True)
    phase = "-phase-2" if "phases" in values else ""
    assert digest(tmp_path / "run", phase) == digest(tmp_path / "whole", phase)
    assert (resumed.metrics, resumed.best, resumed.epoch) == (whole.metrics, whole.best, whole.epoch)


def test_a_stop_in_the_second_phase_is_resumed_there(tmp_path):
    values = {"phases": "true", "epochs": "1"}
    train(tmp_path / "whole", values)
    flag = StopAtCheck(4 + 2)  # the first phase's evaluation has four batches
    assert train(tmp_path / "run", values, flag=flag).state == "interrupted"
    assert (tmp_path / "run" / "checkpoints-phase-2").is_dir()
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run", "-phase-2") == digest(tmp_path / "whole", "-phase-2")


@pytest.mark.parametrize("eval_every", [None, 3])
def test_an_evaluation_that_was_interrupted_is_made_up_for(eval_every, tmp_path):
    values = {} if eval_every is None else {"eval_every": eval_every}
    train(tmp_path / "whole", values)
    flag = StopAtCheck(2)  # at its second batch
    summary = train(tmp_path / "run", values, flag=flag)
    assert (summary.state, summary.steps_attempted) == ("interrupted", 7 if eval_every is None else 3)
    assert not [line for line in lines(tmp_path / "run") if line["kind"] == "eval"]
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


class Gone(BaseException):
    """The process ends here, as at a kill; its threads may still finish their writing."""


def gone_in(evaluation):
    """A change of a recipe: in the ``evaluation``-th evaluation of a process, from 1, it is gone; a list to change that."""

    def change(recipe, _):
        def evaluate(state):
            evaluation[0] -= 1
            if evaluation[0] == 0:
                raise Gone
            return recipe.evaluate(state)

        return attrs.evolve(recipe, evaluate=evaluate)

    return change


@pytest.mark.parametrize(
    "values", [{}, {"eval_every": 5, "plateau": "yes", "precision": "fp32"}], ids=["after epochs", "within"]
)
@pytest.mark.parametrize("evaluation", [1, 2, 3])
def test_a_run_that_is_gone_in_an_evaluation_makes_up_for_it(evaluation, values, tmp_path):
    """The last one too, which comes when every step was taken: nothing is left out, nothing folded twice."""
    train(tmp_path / "whole", values)
    left, out = [1 + evaluation], tmp_path / "run"  # the first of all is the trial before the first step
    recipe = changed(tmp_path, gone_in(left))
    for once_more in (True, False):
        try:
            summary = train(out, {} if out.exists() else values, recipe=recipe, resume=out.exists())
        except Gone:
            left[0] = 1 if once_more else 0  # gone again in the first one that the next process makes
    summary = train(out, resume=True)
    assert summary.state == "finished"
    assert digest(out) == digest(tmp_path / "whole")
    assert comparable(out) == comparable(tmp_path / "whole")


@pytest.mark.parametrize("batch", [2, 6, 10])
def test_an_evaluation_that_was_interrupted_and_then_killed_is_made_up_for_once(batch, tmp_path):
    """A signal in any of three evaluations, a kill in the one that makes up for it, and a signal just after that."""
    values = {"eval_every": 5, "plateau": "yes", "precision": "fp32"}
    train(tmp_path / "whole", values)
    left, out = [0], tmp_path / "run"
    recipe = changed(tmp_path, gone_in(left))
    assert train(out, values, recipe=recipe, flag=StopAtCheck(batch)).state == "interrupted"
    left[0] = 1
    with pytest.raises(Gone):
        train(out, resume=True)
    left[0] = 0
    flag = StopAtCheck(4 + 1)  # its four batches, and the next time that anybody asks
    train(out, resume=True, flag=flag)
    train(out, resume=True)
    assert digest(out) == digest(tmp_path / "whole")
    assert comparable(out) == comparable(tmp_path / "whole")


def test_a_limit_leaves_no_trace_in_what_follows(golden, tmp_path):
    summary = train(tmp_path / "run", limit_steps=5)
    assert (summary.state, summary.steps_attempted, set(summary.metrics)) == (
        "finished",
        5,
        {"loss", "accuracy"},
    )
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(golden)


@pytest.mark.parametrize(
    "values", [{}, {"eval_every": 5}, {"eval_every": 5, "plateau": "yes", "precision": "fp32"}], ids=str
)
def test_a_finished_run_that_is_resumed_says_what_it_said(values, tmp_path):
    """What the last evaluation decided is saved too, where it comes after the last epoch's checkpoint."""
    first = train(tmp_path / "run", values)
    before = digest(tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_bytes())
    assert status["checkpoint"] == max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert status["best_checkpoint"] == f"step-{first.best['step']:012d}"
    again = train(tmp_path / "run", resume=True)
    assert (again.state, again.metrics, again.best) == ("finished", first.metrics, first.best)
    assert digest(tmp_path / "run") == before


def test_a_run_killed_in_the_middle_of_an_epoch_ends_in_the_same_state(golden, tmp_path):
    """What was not saved is taken again."""
    out = tmp_path / "run"
    arguments = [
        "--set",
        "step_s=0.02",
        "--checkpoint-every",
        "2",
        "--log-every",
        "1",
        "--no-tune",
        "--device",
        "cpu",
        "--quiet",
    ]
    child = Forked(tmp_path, "run", POINTS, "--out", str(out), *arguments)
    try:
        child.wait_for(
            lambda: (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step-00000000001*"))
        )
    finally:
        child.kill()
    train(out, {"step_s": "0"}, resume=True)
    assert digest(out) == digest(golden)
    assert comparable(out) == comparable(golden)


def test_a_damaged_newest_checkpoint_costs_some_steps_and_nothing_else(golden, tmp_path, capsys):
    """A warning, the damaged one put aside, the next older one taken: never a run that begins anew in silence."""
    train(tmp_path / "run", stop_at=9)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    model = newest / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    assert call(["inspect", str(newest)]) == 3
    assert call(["resume", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"warning: {model} has the SHA-256" in said
    assert f"It was renamed to .corrupt-{newest.name}." in said
    assert "going on after step 7 (epoch 1 is done)" in said
    assert digest(tmp_path / "run") == digest(golden)
    assert (tmp_path / "run" / "checkpoints" / f".corrupt-{newest.name}").is_dir()
