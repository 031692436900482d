"""What a start that fails leaves behind, and what a run says last."""

import errno
import io
import json
import re
import sys
from pathlib import Path

import attrs
import points_recipe
import pytest
from running import POINTS, changed, lines, train

from steploop import backward_scaled, forward_loss, optimizer_step, unscale_and_clip
from steploop.runs.summary import Summary
from steploop.tools.cli import call
from steploop.tools.commands.endings import finish

QUICK = ["--no-tune", "--device", "cpu", "--log-every", "1"]


def failing(made, _):
    raise ValueError("no such data")


@pytest.mark.parametrize("out", [[], ["--out", "deep/er/run"]])
def test_a_build_that_fails_leaves_no_directory(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    recipe = changed(tmp_path, failing)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no such data"):
        call(["run", recipe, *out, "--quiet", *QUICK])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_build_that_fails_leaves_a_directory_that_was_there_empty_but_for_its_lock(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="no such data"):
        call(["run", changed(tmp_path, failing), "--out", str(tmp_path / "run"), *QUICK])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]
    assert train(tmp_path / "run", {"epochs": 1}).state == "finished"


def test_a_disk_that_is_full_from_the_start_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("steploop.runs.directory_lock.replace_file", full)
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), *QUICK]) == 4
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"steploop: The run directory \S+ cannot be locked: No space left on device\. .*\n", err
    )
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_by_steps_that_are_not_finite_names_the_command_that_replays_the_first(
    tmp_path, capsys
):
    out = tmp_path / "a run"
    assert (
        call(["run", POINTS, "--out", str(out), "--set", "explode_at=8", "--set", "precision=fp32", *QUICK])
        == 5
    )
    err = capsys.readouterr().err
    first = next(line for line in lines(out) if line.get("event") == "skipped")
    assert err.endswith(f"with: steploop replay '{out / first['capsule']}'\n")
    assert first["attempted"] == 9  # of those in the row that ended it
    assert json.loads((out / "status.json").read_bytes())["error"] in err.replace(
        "steploop: ", "NonFiniteError: "
    )
    assert call(["replay", str(out / first["capsule"])]) == 0
    assert capsys.readouterr().out.startswith("Attempted step 9 (epoch 2, batch 2), ")


def ending_at_once(*, members, broken):
    """A change of a recipe: the step of ``broken`` is not finite from the fourth on, and one such step ends the run."""

    def change(made, _):
        def updated(name, state, batch):
            def objective(model, batch):
                loss, outputs = points_recipe.objective(model, batch)
                return loss * (float("nan") if name == broken and state.attempted_steps > 2 else 1.0), outputs

            state = unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
            return optimizer_step(state, max_nonfinite_steps=1)

        def train_step(states, batch):
            return {name: updated(name, one, batch) for name, one in states.items()}

        if not members:
            return attrs.evolve(made, train_step=lambda state, batch: updated("", state, batch))
        states = {name: made.state.clone() for name in members}
        return attrs.evolve(made, state=states, train_step=train_step, monitor=None, evaluate=None)

    return change


@pytest.mark.parametrize(
    ("members", "broken", "kept"),
    [((), "", True), (("a", "b"), "a", True), (("a", "b"), "b", False)],
    ids=str,
)
def test_the_only_step_that_is_not_finite_is_kept_although_it_ends_the_run(
    members, broken, kept, tmp_path, capsys
):
    """Not where another state has taken its step already, whose new tensors only the step itself knows."""
    out = tmp_path / "run"
    recipe = changed(tmp_path, ending_at_once(members=members, broken=broken))
    assert call(["run", recipe, "--out", str(out), "--set", "precision=fp32", *QUICK]) == 5
    err = capsys.readouterr().err
    assert "1 step had gradients that were not finite (limit 1), up to attempted step 4." in err
    skipped = [line for line in lines(out) if line.get("event") == "skipped"]
    assert len(skipped) == kept
    assert err.endswith(f"with: steploop replay {out}/capsules/step-000000000004\n") == kept
    if kept:
        assert (skipped[0]["attempted"], skipped[0]["batch"]) == (4, 4)
        assert call(["replay", str(out / skipped[0]["capsule"])]) == 0
        said = capsys.readouterr().out
        assert said.startswith("Attempted step 4 (epoch 1, batch 4), ")
        assert "loss nan then, nan now" in said


def test_nothing_is_best_before_anything_was_trained(tmp_path, capsys):
    """Although the accuracy of the initial weights is a number."""
    monitored = changed(
        tmp_path, lambda made, _: __import__("attrs").evolve(made, monitor="accuracy", mode="max")
    )
    assert call(["run", monitored, "--out", str(tmp_path / "run"), "--set", "explode_at=0", "--set", "precision=fp32",
                 "--limit-steps", "2", *QUICK]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "(best)" not in out
    assert json.loads(out.splitlines()[-1])["best"] is None


def test_epochs_are_counted_alike_wherever_they_are_said(tmp_path, capsys):
    """From 1, in the lines of the log, on the screen, in status.json and in the summary."""
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), "--set", "eval_every=3", *QUICK]) == 0
    shown = capsys.readouterr().out.splitlines()
    summary = json.loads(shown[-1])
    logged = lines(tmp_path / "run")
    per_epoch = 7
    for line in logged:
        epoch, rest = divmod(line["attempted"], per_epoch)
        assert line["epoch"] == epoch + (rest > 0), line
        assert line["batch"] in {rest, per_epoch if rest == 0 else rest}
    evaluations = [line for line in logged if line["kind"] == "eval"]
    assert [f"epoch {e['epoch']} step {e['step']}:" for e in evaluations] == [
        re.match(r"epoch \d+ step \d+:", text)[0] for text in shown if re.match(r"epoch \d+ step \d+:", text)
    ]
    assert re.match(r"epoch 1/2 step [01]  ", next(text for text in shown if text.startswith("epoch 1/2")))
    best = [e for e in evaluations if e["best"]][-1]
    status = json.loads((tmp_path / "run" / "status.json").read_bytes())
    for said in (summary["best"], status["best"]):
        assert (said["epoch"], said["step"]) == (best["epoch"], best["step"])
    assert status["epoch"] == summary["epoch"] == 2


def test_a_run_of_0_1_0_is_read_with_epochs_from_1(tmp_path):
    from steploop import read_run

    old = [
        {"kind": "train", "attempted": 1, "step": 1, "epoch": 0, "batch": 1, "loss": 1.0},
        {
            "kind": "eval",
            "attempted": 2,
            "step": 2,
            "epoch": 1,
            "batch": 0,
            "metrics": {"loss": 1.0},
            "best": True,
        },
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    (tmp_path / "config.json").write_text("{}")
    run = read_run(tmp_path)
    assert [line["epoch"] for line in (*run.train, *run.evals)] == [1, 1]


def test_a_resume_of_a_run_of_0_1_0_brings_its_log_to_the_new_count(tmp_path):
    """No line in the log is counted otherwise than the others."""
    out = tmp_path / "run"
    train(out, stop_at=10)
    config = json.loads((out / "config.json").read_bytes())
    del config["epochs_from"]
    (out / "config.json").write_text(json.dumps(config))
    older = [{**line, "epoch": line["epoch"] - bool(line["batch"])} for line in lines(out)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in older))
    train(out, resume=True)
    train(tmp_path / "whole")
    found = [(line["attempted"], line["epoch"]) for line in lines(out) if line["kind"] != "event"]
    assert found == [
        (line["attempted"], line["epoch"]) for line in lines(tmp_path / "whole") if line["kind"] != "event"
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_summary(**changes):
    values = {
        "state": "finished", "ending": "finished", "exit_code": 0, "run": "runs/my run", "recipe": "points", "data": "",
        "device": "cpu", "precision": "fp32", "epoch": 2, "steps_attempted": 1400, "steps_applied": 1399, "steps_skipped": 1,
        "metrics": {"loss": 0.25, "accuracy": None}, "best": {"metric": "loss", "value": 0.25, "step": 13, "epoch": 2},
        "seconds": 75.4, "states": {},
    }  # fmt: skip
    return Summary(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {},
            (
                "Finished after 2 epochs, 1,400 steps (1 skipped) in 1:15: loss 0.25  accuracy -. "
                "Best loss 0.25 at step 13 (epoch 2).\nLook at it with: steploop report 'runs/my run'\n"
            ),
        ),
        (
            {"state": "interrupted", "ending": "interrupted", "exit_code": 75, "best": None, "metrics": {}},
            "Interrupted in epoch 2, after 1,400 steps (1 skipped) in 1:15.\nGo on with: steploop resume 'runs/my run'\n",
        ),
        (
            {
                "ending": "limit",
                "best": None,
                "metrics": {},
                "steps_attempted": 1,
                "steps_skipped": 0,
                "epoch": 1,
            },
            "Stopped at the limit of steps in epoch 1, after 1 step in 1:15.\nGo on with: steploop resume 'runs/my run'\n",
        ),
    ],
)
def test_in_a_terminal_the_last_words_are_a_sentence_and_the_next_command(changes, said, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    summary = a_summary(**changes)
    assert finish(summary) == summary.exit_code
    assert sys.stdout.getvalue() == said
    sentence, command = said.splitlines()
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "30")  # the sentence is broken between words, the command not at all
    finish(summary)
    *lines, last = sys.stdout.getvalue().splitlines()
    assert max(map(len, lines)) <= 30
    assert " ".join(lines).split() == sentence.split()
    assert last == command


def test_elsewhere_the_last_line_is_one_json_object_whatever_colours_are_forced(
    tmp_path, monkeypatch, capsys
):
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "60"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), "--epochs", "1", *QUICK]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1])["state"] == "finished"
    assert any("\x1b[32m" in line for line in shown)  # the best evaluation is green, as was asked for
    assert not any(re.search(r"\x1b\[[0-9;?]*[A-HJKhl]", line) for line in shown)  # and no line moves
    assert all(
        Path(tmp_path).name not in line or line.startswith(("points", "{")) for line in shown
    )  # nor is cut
