"""How a damaged run stands: what can be read is shown, what cannot is said, and one bad run hides no other."""

import json
import re
import sys

import pytest
from sample_runs import make_run

from steploop.runs import metrics_file
from steploop.runs.directory_lock import run_lock
from steploop.runs.reading import read_run
from steploop.runs.standing import read_standing
from steploop.tools.cli import call


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "bad", steps=40, epochs=2)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", "{", "config.json is not the JSON that a run writes"),
        ("config.json", "{}", "config.json: it names no recipe."),
        ("config.json", '{"recipe": [1]}', "config.json: recipe should be an object, but is [1]."),
        ("config.json", '{"recipe": {"name": 3}}', "config.json: recipe: name should be a text, but is 3."),
        ("config.json", '{"recipe": {"name": "a"}, "config": 3}', "config.json: config should be an object, but is 3."),
        ("status.json", "[" * 100_000, "status.json is not the JSON that a run writes: it is nested more than 32 levels deep"),
        ("status.json", '{"state": "finished", "step": "x"}', "status.json: step should be a number of steps, but is 'x'."),
        ("status.json", '{"state": "finished", "step": true}', "status.json: step should be a number of steps, but is True."),
        ("status.json", '{"state": "great"}', "state should be one of failed, finished, interrupted, running, but is 'great'."),
        ("status.json", '{"state": "finished", "best": {"metric": 1}}', "status.json: best: metric should be a text, but is 1."),
    ],
)  # fmt: skip
def test_a_damaged_record_is_a_row_that_says_so_and_the_others_are_shown(file, text, said, run, capsys):
    make_run(run.parent / "good", steps=40, epochs=2)
    (run / file).write_text(text)
    for words in (["runs", str(run.parent)], ["status", str(run)]):
        assert call(words) == 0
        out = capsys.readouterr().out
        assert said in out
        if words[0] == "runs":
            assert f"{run}: " in out
            assert ", damaged" in next(line for line in out.splitlines() if line.startswith(str(run)))
            assert f"{run.parent}/good " in out
    assert call(["report", str(run), "--out", str(run / "page.html")]) == 0
    assert said.replace("'", "&#x27;") in (run / "page.html").read_text()
    assert call(["plot", str(run), "--terminal"]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": [1]}',
        '{"attempted": 3}',
        '{"kind": "train", "attempted": "3"}',
        '{"kind": "train", "attempted": -1}',
        '{"kind": "train", "attempted": 3.5}',
        '{"kind": "train", "attempted": 99999999999999999999}',
        '{"kind": "train", "time_s": -1}',
        '{"kind": "train", "time_s": NaN}',
        '{"kind": "eval", "attempted": 1, "metrics": [1]}',
        '{"kind": "eval", "attempted": 1, "metrics": {"loss": "x"}}',
        '{"kind": "eval", "attempted": 1, "best": 1}',
        '{"kind": "event", "x": ' + "[" * 50 + "]" * 50 + "}",
        "[" * 100_000,
        "nonsense",
        '{"kind": "train", "x": "' + "y" * (1 << 20) + '"}',
    ],
)
def test_a_line_with_a_value_of_another_type_is_counted_and_left_out(line, run):
    before = read_run(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    after = read_run(run)
    assert after.damaged_lines == before.damaged_lines + 1
    assert (after.train, after.evals, after.events) == (before.train, before.evals, before.events)


def test_numbers_that_are_none_are_gaps_and_text_among_numbers_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 90, "attempted": 90, "loss": null, "note": "x", "on": true}\n')
    record = read_run(run)
    assert record.train_curve("loss").values[-1] is None
    assert not {"note", "on"} & {*record.train_keys()}


def test_the_lock_decides_whether_a_run_runs_for_every_command(run, capsys):
    def states():
        assert call(["status", str(run), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)["state"]
        assert call(["runs", str(run.parent), "--json"]) == 0
        return status, json.loads(capsys.readouterr().out)[0]["state"]

    assert states() == ("finished", "finished")
    with run_lock(run):
        assert states() == ("running", "running")
    (run / "status.json").write_text('{"state": "running"}')
    assert states() == ("died", "died")
    (run / "status.json").write_text('{"state": "runn')  # half of it, after a power loss
    assert states() == ("died", "died")
    (run / "status.json").write_text('{"state": "great"}')
    assert states() == ("unknown", "unknown")
    (run / "status.json").unlink()
    assert states() == ("died", "died")


def test_a_run_whose_config_is_damaged_is_not_to_be_resumed(run):
    (run / "status.json").write_text('{"state": "interrupted"}')
    assert read_standing(run).resumable
    (run / "config.json").write_text("{")
    assert not read_standing(run).resumable


def test_a_very_long_log_is_read_from_its_beginning_and_that_is_said(run, monkeypatch):
    monkeypatch.setattr(metrics_file, "MAX_LINES", 20)
    record = read_run(run)
    assert len(record.train) + len(record.evals) + len(record.events) == 20
    assert record.problems == ("metrics.jsonl is longer than 20 lines or 256 MiB; its beginning is shown.",)
    monkeypatch.undo()
    monkeypatch.setattr(metrics_file, "MAX_NAMES", 6)
    record = read_run(run)
    assert record.problems == ("metrics.jsonl has more than 6 different names; the first of them are shown.",)
    assert len(read_run(run).train) == 40


@pytest.mark.parametrize("columns", [200, 100, 80, 60, 40])
def test_the_table_of_runs_fits_the_window_and_cuts_nothing_off(columns, run, capsys, monkeypatch):
    make_run(
        run.parent / "a_run_with_a_rather_long_name_of_its_own", lr=0.03, batch_size=128, steps=40, epochs=2
    )
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call(["runs", "runs"]) == 0
    out = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= columns
    for word in ("runs/bad", "two_moons", "lr=0.03", "batch_size=128", "loss", "38(+2skipped)", "finished"):
        assert word in "".join(out.split())
    assert "a_run_with_a_rather_long_name_of_its_own" in "".join(out.split())
