"""``steploop diff`` and ``steploop status``: what they say, as text and as JSON."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steploop import Optimizer, TrainState, backward_scaled, forward_loss, optimizer_step, unscale_and_clip
from steploop.checkpoint import save
from steploop.runs.directory import RunDirectory, write_json
from steploop.runs.directory_lock import run_lock
from steploop.runs.reading import read_run
from steploop.tools.cli import call
from steploop.tools.report.results import outcome


def trained(steps):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9))
    batch = (torch.ones(4, 3), torch.tensor([0, 1, 0, 0]))
    for _ in range(steps):
        state = forward_loss(state, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
        state = optimizer_step(unscale_and_clip(backward_scaled(state), max_norm=1.0))
    return state


def test_equal_checkpoints_are_called_equal(tmp_path, capsys):
    save(trained(2), tmp_path / "a")
    save(trained(2), tmp_path / "b")
    assert call(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.startswith("equal: both hold the state ")


def test_the_first_tensors_that_differ_are_named_with_the_difference(tmp_path, capsys):
    save(trained(2), tmp_path / "a")
    save(trained(3), tmp_path / "b")
    assert call(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert "bias: 2 of 2 elements differ, the largest difference is" in out
    assert "slots.bias.momentum_buffer: 2 of 2 elements differ" in out
    assert "applied_steps: 2 in A, 3 in B" in out
    assert call(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is False
    assert result["a"] != result["b"]


def test_a_checkpoint_of_another_model_says_what_is_only_on_one_side(tmp_path, capsys):
    save(trained(1), tmp_path / "a")
    other = TrainState.create(nn.Linear(3, 2, bias=False), Optimizer(torch.optim.SGD, lr=0.1))
    save(other, tmp_path / "b")
    assert call(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "bias: only in A" in capsys.readouterr().out


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path)
    write_json(directory.config, {"recipe": {"name": "x"}})
    return directory


def status_of(run, capsys):
    assert call(["status", str(run.path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_interrupted_run_is_to_be_resumed_and_a_finished_one_is_not(run, capsys):
    write_json(run.status, {"state": "interrupted", "exit_code": 75, "step": 3, "pid": 1, "host": "h"})
    found = status_of(run, capsys)
    assert (found["state"], found["exit_code"], found["step"], found["resume"]) == (
        "interrupted",
        75,
        3,
        True,
    )
    assert call(["status", str(run.path)]) == 0
    assert f"go on with: steploop resume {run.path}" in capsys.readouterr().out
    write_json(run.status, {"state": "finished", "exit_code": 0, "step": 9})
    assert status_of(run, capsys)["resume"] is False


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("finished", ""),
        ("early_stop", ", by early stopping"),
        ("limit", ", at the limit of steps; steploop resume {run} trains on"),
        ("gone", ""),
        (None, ""),
    ],
)
def test_a_finished_run_says_how_it_ended(ending, said, run, capsys):
    """A look at the first steps is no training that is through; and a requeue script does not go on with it."""
    write_json(run.status, {"state": "finished", "exit_code": 0, "step": 9, "ending": ending})
    found = status_of(run, capsys)
    assert (found["ending"], found["resume"]) == (ending if said or ending == "finished" else None, False)
    assert call(["status", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{run.path}: finished{said.format(run=run.path)}"
    sentence = {"early_stop": "Finished.", "limit": "Finished at the limit of steps; it can be resumed."}
    assert outcome(read_run(run.path)) == sentence.get(ending, "Finished.")


def test_a_run_that_holds_its_lock_is_running_and_one_that_does_not_has_died(run, capsys):
    write_json(run.status, {"state": "running", "step": 3, "pid": 1, "host": "h"})
    with run_lock(run.path) as owner:
        found = status_of(run, capsys)
        assert (found["state"], found["pid"], found["host"]) == ("running", owner.pid, owner.host)
        assert found["resume"] is False
    found = status_of(run, capsys)
    assert (found["state"], found["resume"]) == ("died", True)


@pytest.mark.parametrize(
    ("evaluated", "saved", "said"),
    [(None, 40, 40), (30, 40, 40), (50, 40, 50), (30, None, 30), (None, None, None)],
)
def test_a_killed_run_has_come_as_far_as_its_last_evaluation_or_checkpoint(
    evaluated, saved, said, run, capsys
):
    write_json(run.status, {"state": "running", **({} if evaluated is None else {"step": evaluated})})
    if saved is not None:
        (run.path / "checkpoints" / f"step-{saved:012}").mkdir(parents=True)
    assert status_of(run, capsys)["step"] == said
    assert call(["status", str(run.path)]) == 0
    assert f"steps: {'unknown' if said is None else said}, checkpoint: " in capsys.readouterr().out


def test_a_directory_without_a_run_is_refused(tmp_path, capsys):
    assert call(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
