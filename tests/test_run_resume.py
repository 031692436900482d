"""A run that is stopped anywhere and resumed gives, bit for bit, what it would have given uninterrupted."""

import pytest
from running import POINTS, Forked, StopAtCheck, digest, lines, train

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
    summary = train(tmp_path / "run", stop_at=stop)
    assert (summary.state, summary.exit_code, summary.steps_attempted) == ("interrupted", 75, stop)
    summary = train(tmp_path / "run", resume=True)
    assert (summary.state, summary.exit_code) == ("finished", 0)
    assert digest(tmp_path / "run") == digest(golden)
    assert comparable(tmp_path / "run") == comparable(golden)


def test_three_stops_in_one_epoch_repeat_nothing_and_skip_nothing(golden, tmp_path):
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


def test_watching_a_run_does_not_change_it(golden, tmp_path):
    train(tmp_path / "watched", checkpoint_every=1, csv=True)
    train(tmp_path / "unwatched", log_every=1000)
    assert digest(tmp_path / "watched") == digest(golden) == digest(tmp_path / "unwatched")


def test_a_limit_leaves_no_trace_in_what_follows(golden, tmp_path):
    summary = train(tmp_path / "run", limit_steps=5)
    assert (summary.state, summary.steps_attempted, set(summary.metrics)) == (
        "finished",
        5,
        {"loss", "accuracy"},
    )
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(golden)


def test_a_finished_run_that_is_resumed_says_what_it_said(golden, tmp_path):
    first = train(tmp_path / "run")
    before = digest(tmp_path / "run")
    again = train(tmp_path / "run", resume=True)
    assert (again.state, again.metrics, again.best) == ("finished", first.metrics, first.best)
    assert digest(tmp_path / "run") == before


def test_a_run_killed_in_the_middle_of_an_epoch_ends_in_the_same_state(golden, tmp_path):
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


def test_a_damaged_newest_checkpoint_costs_some_steps_and_nothing_else(golden, tmp_path):
    train(tmp_path / "run", stop_at=9)
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    model = newest / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    train(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(golden)
