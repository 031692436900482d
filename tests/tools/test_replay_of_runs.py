"""From the command line: a run that explodes leaves a capsule and an event, and `steploop replay` names the culprit."""

import json
from pathlib import Path

import pytest

from steploop.runs.reading import read_run
from steploop.tools.cli import call

EXPLODES = str(Path(__file__).parents[1] / "helpers" / "broken_recipes" / "explodes.py")


@pytest.mark.parametrize(("where", "named"), [("forward", "body.normalise"), ("backward", "body.length")])
def test_a_run_that_explodes_is_replayed(tmp_path, capsys, where, named):
    run = tmp_path / "run"
    assert (
        call(
            [
                "run",
                EXPLODES,
                "--set",
                f"where={where}",
                "--set",
                "at=13",
                "--out",
                str(run),
                "--quiet",
                "--no-tune",
            ]
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["steps_attempted"], summary["steps_skipped"]) == (20, 1)
    record = read_run(run)
    (event,) = record.events
    assert (event["attempted"], event["epoch"], event["capsule"]) == (14, 2, "capsules/step-000000000014")
    assert record.skipped_steps() == (14,)
    assert call(["replay", str(run / event["capsule"])]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Attempted step 14 (epoch 2, batch 4), recorded on cpu with torch ")
    assert f"\n{named} (" in text
    assert "What went in:\n  input 0 (8, 6) float32" in text
    assert call(["replay", str(run / event["capsule"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reproduced"]
    assert found["finding"]["module"] == named
    assert found["finding"]["phase"] == where


def test_a_good_run_leaves_no_capsule_and_its_layer_norms_where_asked(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["run", EXPLODES, "--set", "at=1000", "--epochs", "1", "--out", str(run), "--quiet", "--no-tune"]
    assert call([*words, "--layer-norms", "2", "--log-every", "5"]) == 0
    assert not (run / "capsules").exists()
    record = read_run(run)
    groups = [key for key in record.train_keys() if key.startswith("layer_norm/")]
    assert groups == ["layer_norm/body.project", "layer_norm/body.norm", "layer_norm/body.head"]
    for line in record.train:
        whole = sum(line[group] ** 2 for group in groups) ** 0.5
        assert whole == pytest.approx(line["clipped_norm"], rel=1e-5)
    assert call(["report", str(run)]) == 0
    assert "body.project" in (run / "report.html").read_text()


def test_the_range_test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "lr-find",
        EXPLODES,
        "--set",
        "at=1000",
        "--set",
        "momentum=0.5",
        "--steps",
        "40",
        "--device",
        "cpu",
    ]
    assert call(words) == 0
    out, err = capsys.readouterr()
    line = json.loads(out)
    assert line["pictures"] == ["lr-find-explodes.png", "lr-find-explodes.svg"]
    assert (tmp_path / "lr-find-explodes.png").is_file()
    assert "loss, smoothed" in err
    if line["suggestion"] is not None:
        assert f"Suggestion: {line['suggestion']:.2g}: the smoothed loss falls fastest per decade" in err


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, capsys):
    assert call(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"steploop: {tmp_path} is not a run directory")
    assert call(["schedules", "onecycle"]) == 2
    assert "Did you mean one_cycle?" in capsys.readouterr().err
    assert call(["replay", str(tmp_path)]) == 2
    assert "holds no capsule.json" in capsys.readouterr().err
