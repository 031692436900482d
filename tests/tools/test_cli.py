"""The command line: what it refuses, what it prints, how it exits."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from compiled_runs import run_as_it_is
from rich.console import Console
from running import POINTS, Forked, digest, lines, train

from steploop import __version__
from steploop.core.interruption import Interrupted
from steploop.data.order import epoch_order
from steploop.errors import ConfigError
from steploop.runs.logs.screens import LiveScreen, PlainScreen, choose_screen
from steploop.tools import application
from steploop.tools.cli import call

QUICK = ["--no-tune", "--device", "cpu"]


def test_the_last_line_says_how_it_went_in_json(tmp_path, capsys):
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), *QUICK]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert err == ""
    assert summary["run"] == str(tmp_path / "run")
    assert (summary["state"], summary["exit_code"], summary["data"]) == ("finished", 0, "28 random points")
    assert (summary["steps_attempted"], summary["steps_applied"] + summary["steps_skipped"]) == (14, 14)
    assert set(summary["metrics"]) == {"loss", "accuracy"}
    assert summary["best"]["metric"] == "loss"
    assert summary["metrics"] == json.loads((tmp_path / "run" / "status.json").read_bytes())["metrics"]


def test_quiet_prints_that_line_and_nothing_else(tmp_path, capsys):
    assert call(["run", POINTS, "--out", str(tmp_path / "run"), "--quiet", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), err) == (1, "")


def test_a_run_directory_holds_what_it_takes_to_repeat_the_run(tmp_path):
    out = tmp_path / "run"
    train(out, {"epochs": "1", "learning_rate": "0.05"})
    config = json.loads((out / "config.json").read_bytes())
    assert config["recipe"]["name"] == "points_recipe"
    assert (config["config"]["epochs"], config["config"]["learning_rate"], config["precision"]) == (
        1,
        0.05,
        "fp16",
    )
    assert set(config) >= {
        "steploop",
        "device",
        "data",
        "versions",
        "git_commit",
        "command",
        "tuning",
        "compile",
    }
    assert (out / "recipe.py").read_bytes() == Path(POINTS).read_bytes()
    kinds = [line["kind"] for line in lines(out)]
    assert kinds == ["train"] * 7 + ["eval"]
    assert set(lines(out)[0]) >= {
        "step", "attempted", "epoch", "batch", "loss", "learning_rate", "grad_norm", "clipped_norm", "loss_scale",
        "skipped", "samples_per_s", "data_wait", "time_s",
    }  # fmt: skip
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000000000007"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--set", "lerning_rate=1"],
            "points_recipe has no setting 'lerning_rate'. Did you mean learning_rate?",
        ),
        (
            ["--set", "learning_rate=fast"],
            "points_recipe: learning_rate must be float, but got 'fast'; its default is 0.1.",
        ),
        (["--set", "epochs=1.5"], "points_recipe: epochs must be int, but got '1.5'; its default is 2."),
        (
            ["--set", "precision=fp61"],
            "must be one of fp32, bf16, fp16, but got 'fp61'; its default is fp16. Did you mean fp16?",
        ),
        (["--set", "epochs"], "--set takes name=value, as in --set epochs=5, but got 'epochs'."),
        (["--set", "epochs=1", "--epochs", "2"], "--epochs and --set epochs are both given."),
        (["--device", "gpu"], "--device must be auto, cpu, cuda or mps, but is 'gpu'."),
        (["--resume", "nowhere"], "nowhere is no directory."),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert call(["run", POINTS, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("steploop: ")
    assert sentence in err
    assert (out, len(err.splitlines())) == ("", 1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_option_is_a_usage_error_that_names_the_nearest(capsys):
    assert call(["run", POINTS, "--epoch", "2"]) == 2
    assert "--epochs" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_name(capsys):
    assert call(["run", "cifar_am"]) == 2
    assert "Did you mean cifar_amp?" in capsys.readouterr().err


def test_a_second_run_into_a_directory_is_refused(tmp_path, capsys):
    train(tmp_path / "run", {"epochs": "1"})
    before = digest(tmp_path / "run")
    assert call(["run", POINTS, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert f"holds a run already. Go on with it by steploop resume {tmp_path / 'run'}" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert call(["run", POINTS, "--out", str(tmp_path / "mine")]) == 2
    assert "holds 'thesis.txt' and is not empty already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert digest(tmp_path / "run") == before


def test_runs_without_a_name_get_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert call(["run", POINTS, "--epochs", "0", "--quiet", *QUICK]) == 0
    (tmp_path / "runs" / "points_recipe-9").mkdir()
    assert call(["run", POINTS, "--epochs", "0", "--quiet", *QUICK]) == 0
    assert [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()] == [
        f"runs/points_recipe-{n}" for n in (1, 2, 10)
    ]


def test_a_run_that_is_not_finite_ends_with_code_5_and_keeps_finite_parameters(tmp_path, capsys):
    out = tmp_path / "run"
    assert call(["run", POINTS, "--out", str(out), "--set", "explode_at=8", *QUICK]) == 5
    err = capsys.readouterr().err
    assert "3 steps in a row had gradients that were not finite" in err
    order = epoch_order(28, seed=0, epoch=1).tolist()
    # attempted step 9 is batch 2 of the second epoch; the third in a row ends the run
    assert "up to attempted step 11, loss scale" in err
    assert f"The last of them was batch 4 of epoch 2: samples {order[12:16]}." in err
    assert len(err.splitlines()) == 1
    skipped = [line for line in lines(out) if line.get("event") == "skipped" and line["attempted"] > 8]
    assert [line["samples"] for line in skipped] == [order[4:8], order[8:12], order[12:16]]
    status = json.loads((out / "status.json").read_bytes())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert status["error"].startswith("NonFiniteError: ")
    assert train(out, {"explode_at": -1}, resume=True).state == "finished"


def test_debug_shows_the_traceback_of_our_errors(monkeypatch, capsys):
    assert call(["run", POINTS, "--debug", "--set", "x=1"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_signal_while_an_error_is_said_is_no_traceback(monkeypatch, capsys):
    class SlowError(ConfigError):
        def __str__(self):
            raise Interrupted(signal.SIGTERM)

    def fails(**_):
        raise SlowError

    monkeypatch.setattr(application, "app", fails)
    assert call(["run", "mnist"]) == 75
    assert json.loads(capsys.readouterr().out)["again"] == "steploop run mnist"
    assert call(["runs"]) == 128 + signal.SIGTERM


def test_an_error_of_the_recipe_shows_where(tmp_path, capsys):
    recipe = tmp_path / "broken.py"
    recipe.write_text("import attrs\n\n\n1 / 0\n")
    assert call(["run", str(recipe)]) == 2
    assert (
        f"The recipe {recipe} cannot be loaded: ZeroDivisionError: division by zero (line 4)."
        in capsys.readouterr().err
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_found_out_before_the_first_step(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert call(["run", POINTS, "--out", str(tmp_path / "locked" / "run")]) == 4


def test_a_file_in_the_place_of_the_directory_is_found_out_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert call(["run", POINTS, "--out", str(tmp_path / "file" / "run"), *QUICK]) == 4
    assert (
        "cannot be written: Not a directory. Choose another directory with --out." in capsys.readouterr().err
    )


def test_the_shipped_recipes_are_listed_with_a_line_each(capsys):
    assert call(["recipes"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cifar_amp ") and "CIFAR-10" in line for line in found)
    assert all(len(line.split(maxsplit=1)) == 2 for line in found)


def test_a_checkpoint_is_inspected(tmp_path, capsys):
    train(tmp_path / "run")
    assert call(["inspect", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^\S+step-0000000000\d\d: whole$", out, re.MULTILINE)
    assert "optimizer    AdamW" in out
    assert re.search(r"lr=\S+, betas=\(0\.9, 0\.999\), eps=1e-08", out)
    assert "loss scale" in out
    assert call(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"]["states"][""]["epoch"] == 2
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    with (newest / "model.safetensors").open("r+b") as file:
        file.write(b"\xff")
    assert call(["inspect", str(newest)]) == 3


def test_resuming_a_damaged_run_ends_with_code_3(tmp_path, capsys):
    train(tmp_path / "run", {"epochs": "1"})
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        file.write_bytes(b"{}")
    assert call(["resume", str(tmp_path / "run"), "--quiet"]) == 3
    assert "None of the 1 checkpoints" in capsys.readouterr().err


def test_a_resume_elsewhere_warns_and_can_be_refused(tmp_path, monkeypatch, capsys):
    import torch

    train(tmp_path / "run", stop_at=3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert call(["resume", str(tmp_path / "run"), "--require-exact", "--quiet"]) == 3
    assert "threads 1 there, 64 here" in capsys.readouterr().err
    assert call(["resume", str(tmp_path / "run")]) == 0
    assert (
        "warning: The checkpoint was written in another environment: threads 1 there, 64 here"
        in capsys.readouterr().out
    )


def test_the_version_needs_no_torch():
    program = "import sys; from steploop.tools.cli import call; code = call(['--version']); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [f"steploop {__version__}", "0 False", ""]


IN_ASCII = """
import sys
from steploop.tools.cli import call
for stream in (sys.stdout, sys.stderr):  # as main does
    stream.reconfigure(errors="backslashreplace")
out, recipe, elsewhere = sys.argv[1:]
begin = ["run", recipe, "--set", "name=" + out.rpartition("/")[2], "--out", out, "--no-tune", "--device", "cpu", "--limit-steps"]
looks = [["status", out], ["runs", out], ["inspect", out], ["plot", out, "--terminal"], ["diff", out, out], ["report", out]]
for words in ([*begin, "3"], ["resume", out], *looks, ["export", out, elsewhere], ["resume", out + "x"]):
    print(words[0], call(words), file=sys.stderr)
"""


def test_a_locale_without_unicode_does_no_harm(tmp_path):
    """A run directory called é ✓ under LC_ALL=C: run, stop, save, resume, print, and all that looks at it."""
    out = tmp_path / "é ✓"
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    settings["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-c", IN_ASCII, str(out), POINTS, str(tmp_path / "é ✓.safetensors")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **settings}, check=False)
    codes = [
        line.split() for line in done.stderr.decode("ascii").splitlines() if not line.startswith("steploop")
    ]
    looks = ["status", "runs", "inspect", "plot", "diff", "report", "export"]
    assert codes == [[name, "0"] for name in ("run", "resume", *looks)] + [["resume", "2"]], done.stderr
    said = done.stdout.decode("ascii")
    ends = [json.loads(line) for line in said.splitlines() if line.startswith('{"state"')]
    assert [(end["run"], end["ending"]) for end in ends] == [(str(out), "limit"), (str(out), "finished")]
    assert json.loads((out / "config.json").read_bytes())["config"]["name"] == "é ✓"
    assert "é ✓" in (out / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "é ✓.safetensors").exists()
    train(tmp_path / "whole", {"name": "é ✓"})
    assert digest(out) == digest(tmp_path / "whole")


def a_line(**changes):
    line = {
        "step": 12345, "attempted": 12346, "epoch": 8, "epochs": 90, "batch": 345, "loss": 2.345678, "learning_rate": 1.25e-4,
        "grad_norm": 123.456, "clipped_norm": 1.0, "skipped": 0, "samples_per_s": 123456.7, "data_wait": 0.1,
    }  # fmt: skip
    return {**line, **changes}


@pytest.mark.parametrize("width", [80, 60, 200])
def test_progress_fits_the_terminal(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, highlight=False, color_system=None)
    screen = LiveScreen(console)
    screen.note("points: 10 parameters")
    screen.train(a_line(), done=0.4, left_s=12345.0)
    still = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, color_system=None)
    still.print(screen._line)
    screen.evaluation({"epoch": 9, "step": 12345, "metrics": {"loss": 0.5, "accuracy": None}, "best": True})
    screen.close()
    shown = still.file.getvalue().rstrip("\n")
    assert len(shown) <= width
    assert "\n" not in shown
    if width >= 80:
        assert "epoch 8/90 step 12345 " in shown
        assert all(
            part in shown for part in ("loss 2.346", "lr 1.3e-04", "grad 123.5", "123k/s", "3:25:45 left")
        )
    assert ("━" in shown) == (width == 200)
    assert "epoch 9 step 12345: loss 0.5  accuracy -  (best)" in file.getvalue()
    assert "\x1b[?25h" in file.getvalue()  # the cursor is back


def test_without_a_terminal_a_line_comes_every_few_seconds(monkeypatch, capsys):
    now = iter([100.0, 101.0, 104.9, 105.0, 107.0])
    clock = types.SimpleNamespace(monotonic=lambda: next(now))
    monkeypatch.setattr("steploop.runs.logs.screens.time", clock)
    screen = choose_screen(quiet=False)
    assert isinstance(screen, PlainScreen)
    for step in range(5):
        screen.train(a_line(step=step), done=0.1, left_s=None)
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 8/90 step {step}  loss 2.346  lr 1.3e-04  grad 123.5  123k/s" for step in (0, 3)
    ]


def test_numbers_of_several_states_stand_side_by_side():
    from steploop.runs.logs.progress_text import format_step

    line = a_line(**{"g.loss": 1.0, "d.loss": 0.5, "g.learning_rate": 0.1, "d.learning_rate": 0.2})
    for name in ("loss", "learning_rate", "grad_norm"):
        del line[name]
    parts = format_step(line)[1]
    assert (parts["loss"], parts["lr"]) == ("loss 1/0.5", "lr 0.1/0.2")


def test_a_traceback_of_the_users_own_code_is_not_hidden(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import attrs\n@attrs.frozen\nclass Config:\n    pass\ndef build(config, device):\n    return {}['key']\n"
    )
    child = Forked(tmp_path, "run", str(recipe), "--out", str(tmp_path / "run"), *QUICK)
    code, _, err = child.end()
    assert code == 1
    assert "KeyError: 'key'" in err


def test_compile_auto_measures_both_forms_and_records_the_figures(tmp_path, capsys, monkeypatch):
    """Whichever wins, the run goes on, and says in its record what was measured."""
    run_as_it_is(monkeypatch)
    assert (
        call(
            [
                "run",
                POINTS,
                "--compile",
                "auto",
                "--set",
                "precision=fp32",
                "--out",
                str(tmp_path / "run"),
                *QUICK,
            ]
        )
        == 0
    )
    events = [line for line in lines(tmp_path / "run") if line.get("event") == "compile"]
    assert not any("form" in event for event in events[:-1])
    chosen = events[-1]
    faster = min(("eager_us", "compiled_us"), key=chosen.get)
    assert chosen["form"] == faster.removesuffix("_us")
    assert (
        f"{chosen['compiled_us']:.0f} us a step compiled, {chosen['eager_us']:.0f} us in eager"
        in chosen["note"]
    )
    assert len(chosen["compile_s"]) == 1
    assert chosen["note"] in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_bytes())["compile"] == "auto"


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        (["--compile", POINTS], True),
        (["--compile", "on", POINTS], True),
        ([POINTS, "--compile"], True),
        ([POINTS, "--compile=auto"], "auto"),
        (["--compile", "off", POINTS], False),
        ([POINTS], None),
    ],
)
def test_compile_stands_alone_or_takes_a_mode(words, mode, tmp_path, monkeypatch):
    seen = []

    def carry_out(request, *_):
        seen.append(request)
        raise SystemExit(0)

    monkeypatch.setattr("steploop.runs.from_python.carry_out", carry_out)
    assert call(["run", *words, "--out", str(tmp_path / "run"), *QUICK]) == 0
    assert [request.compile for request in seen] == [mode]


def test_another_mode_of_compile_is_refused(tmp_path, capsys):
    assert call(["run", POINTS, "--compile=fast", "--out", str(tmp_path / "run")]) == 2
    assert "'fast' is not one of 'on', 'off', 'auto'" in capsys.readouterr().err
