"""Run directories as they are read: whole, cut off, resumed, in phases; and what tells runs apart."""

import json
import os
import socket

import pytest
from sample_runs import make_run

from steploop.errors import ConfigError
from steploop.runs.directory_lock import run_lock
from steploop.runs.reading import Curve, find_runs, read_run
from steploop.tools.report.results import duration, epoch_of, how_to_reproduce, outcome, phases, result_of
from steploop.tools.report.run_labels import differences, labels, short


def write_lines(path, lines):
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(attempted, **values):
    return {"kind": "train", "step": attempted, "attempted": attempted, "loss": float(attempted)} | values


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    assert (run.name, run.recipe, run.state) == ("a", "two_moons", "finished")
    assert (run.attempted, run.steps, run.skipped) == (240, 237, 3)
    assert run.fields["lr"] == 0.1
    assert run.metrics == ("loss", "accuracy")
    assert len(run.train_curve("loss")) == 240
    assert run.eval_curve("accuracy").steps == (60, 120, 180, 240)
    assert run.skipped_steps() == (17, 18, 120)
    assert run.time_s == pytest.approx(240 * 0.011 + 4 * 0.3)
    assert "Two moons" in run.source
    assert run.damaged_lines == 0


def test_the_last_line_of_a_killed_run_is_counted_and_left_out(tmp_path):
    run = make_run(tmp_path / "a")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-25])
    record = read_run(run)
    assert record.damaged_lines == 1
    assert len(record.evals) == 3


def test_a_run_that_ended_between_two_log_points_counts_all_its_steps(tmp_path):
    write_lines(tmp_path / "run", [train(70), train(72)])
    (tmp_path / "run" / "status.json").write_text('{"state": "interrupted", "step": 73}')
    assert read_run(tmp_path / "run").steps == 73


def test_of_steps_that_were_done_twice_the_later_lines_count(tmp_path):
    lines = [train(n) for n in range(1, 6)]
    lines += [{"kind": "event", "event": "skipped", "step": 4, "attempted": 5}]
    lines += [{"kind": "event", "event": "resumed", "step": 3, "attempted": 3}]
    lines += [train(n, loss=10.0 + n) for n in range(4, 7)]
    write_lines(tmp_path, lines)
    run = read_run(tmp_path)
    assert run.train_curve("loss") == Curve((1, 2, 3, 4, 5, 6), (1.0, 2.0, 3.0, 14.0, 15.0, 16.0))
    assert [event["event"] for event in run.events] == ["resumed"]


def test_the_steps_of_a_second_phase_follow_those_of_the_first(tmp_path):
    lines = [train(n, epoch=0) for n in (1, 2, 3)]
    lines += [train(n, epoch=0, phase=1) for n in (1, 2)]
    lines += [{"kind": "event", "event": "skipped", "step": 1, "attempted": 2, "phase": 1}]
    write_lines(tmp_path, lines)
    run = read_run(tmp_path)
    assert run.train_curve("loss").steps == (1, 2, 3, 4, 5)
    assert run.steps == 5
    assert run.skipped_steps() == (5,)


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    run = read_run(make_run(tmp_path / "a", bad_loss_at=(3,)))
    assert run.train_curve("loss").values[3] is None
    assert run.train_curve("loss").values[4] is not None


def test_skips_are_found_in_the_counts_where_no_event_tells_them(tmp_path):
    write_lines(tmp_path, [train(n, skipped=s) for n, s in ((1, 0), (10, 2), (20, 2), (30, 3))])
    run = read_run(tmp_path)
    assert run.skipped == 3
    assert run.skipped_steps() == (10, 30)


def test_a_run_that_says_running_runs_while_it_holds_its_lock_and_has_died_without(tmp_path):
    """A process number says nothing: it may be another's by now, or of another machine."""
    run = make_run(tmp_path / "a", state="running")
    status = json.loads((run / "status.json").read_text())
    for pid, host in ((os.getpid(), socket.gethostname()), (2**22 + 1, socket.gethostname()), (1, "far")):
        (run / "status.json").write_text(json.dumps(status | {"host": host, "pid": pid}))
        assert read_run(run).state == "died"
        with run_lock(run):
            assert read_run(run).state == "running"
    assert outcome(read_run(run)) == "Its process is gone without having finished; it can be resumed."


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_run(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} is not a run directory: expected config.json or metrics.jsonl in it. `steploop runs DIR` lists those below DIR."
    )


def test_runs_are_found_at_any_depth_but_not_inside_of_runs(tmp_path):
    for name in ("b", "deep/er/a"):
        make_run(tmp_path / name)
    make_run(tmp_path / "b" / "checkpoints" / "inner")
    assert find_runs(tmp_path) == [tmp_path / "b", tmp_path / "deep" / "er" / "a"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    with pytest.raises(ConfigError, match="is not a directory"):
        find_runs(tmp_path / "none")


def test_runs_are_labelled_by_what_differs_in_their_config(tmp_path):
    runs = [
        read_run(make_run(tmp_path / "a")),
        read_run(make_run(tmp_path / "b", lr=0.03)),
        read_run(make_run(tmp_path / "c", lr=0.03, batch_size=128)),
    ]
    assert differences(runs) == {"lr": (0.1, 0.03, 0.03), "batch_size": (64, 64, 128)}
    assert labels(runs) == ["lr=0.1 batch_size=64", "lr=0.03 batch_size=64", "lr=0.03 batch_size=128"]
    assert labels(runs[:1]) == ["a"]


def test_runs_of_one_config_are_labelled_by_their_directory(tmp_path):
    twins = [read_run(make_run(tmp_path / place)) for place in ("x/a", "x/b", "y/a")]
    assert labels(twins[:2]) == ["a", "b"]
    assert labels([twins[0], twins[2]]) == [str(tmp_path / "x" / "a"), str(tmp_path / "y" / "a")]
    other = read_run(make_run(tmp_path / "c", lr=0.5))
    assert labels([*twins[:2], other]) == ["lr=0.1 (a)", "lr=0.1 (b)", "lr=0.5"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "none"),
        (1e-05, "1e-05"),
        (3, "3"),
        ((1, 2), "1,2"),
        ({"a": 1.0}, "a=1"),
        ("x" * 50, "x" * 18 + "…" + "x" * 18),
    ],
)
def test_a_setting_is_written_as_on_a_command_line(value, text):
    assert short(value) == text


def test_the_result_is_the_best_evaluation_by_the_monitored_metric(tmp_path):
    run = make_run(tmp_path / "a")
    result = result_of(read_run(run))
    assert (result.metric, result.step, result.epoch, result.is_best) == ("loss", 240, 4, True)
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["best"] = line["attempted"] == 120
    write_lines(run, lines)
    assert (result_of(read_run(run)).step, result_of(read_run(run)).epoch) == (120, 2)


def test_an_epoch_is_counted_from_one_by_its_last_batch():
    assert epoch_of({"epoch": 0, "batch": 60}) == 1
    assert epoch_of({"epoch": 4, "batch": 0}) == 4
    assert epoch_of({}) is None


def test_the_phases_add_up_to_the_time_of_the_run(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    spent = phases(run)
    assert spent.total == pytest.approx(run.time_s)
    assert spent.evaluation == pytest.approx(4 * 0.3)
    assert spent.starting == pytest.approx(0.011)
    assert spent.waiting == pytest.approx(239 * 0.011 * 0.06)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (99.5, "99.5 s"), (125, "2 min 5 s"), (7500, "2 h 5 min")]
)
def test_a_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_how_to_reproduce_names_versions_command_and_every_field(tmp_path):
    lines = how_to_reproduce(read_run(make_run(tmp_path / "a")))
    assert lines[0] == "pip install steploop==0.1.0 torch==2.14.1"
    assert lines[1] == "steploop run recipes/two_moons.py --set lr=0.1 --set batch_size=64"
    assert (
        lines[3]
        == f"steploop run {tmp_path}/a/recipe.py --set lr=0.1 --set batch_size=64 --set epochs=4 --set seed=0"
    )


def test_a_failed_run_says_why(tmp_path):
    run = make_run(tmp_path / "a", state="failed")
    status = json.loads((run / "status.json").read_text()) | {"error": "NonFiniteError: 100 steps in a row."}
    (run / "status.json").write_text(json.dumps(status))
    assert outcome(read_run(run)) == "Failed: NonFiniteError: 100 steps in a row."
