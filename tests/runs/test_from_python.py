"""``steploop.run``: recipes as files, names, values and functions; what a notebook shows and what Ctrl-C does there."""

import json
import os
import signal
import sys
import types

import attrs
import points_recipe
import pytest
import torch
from running import POINTS, digest, lines, train

import steploop
from steploop.errors import ConfigError, RunExistsError
from steploop.recipe.recipe import Recipe
from steploop.runs import from_python
from steploop.runs.logs.notebook_screen import NotebookScreen, in_notebook
from steploop.tools.cli import call

MODEL = torch.nn.Linear(1, 1)
CPU = torch.device("cpu")


def build(epochs=2, learning_rate: float = 0.1, device=None):
    """A function whose parameters are its settings."""
    config = points_recipe.Config(epochs=epochs, learning_rate=learning_rate)
    return points_recipe.build(config, device)


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(recipe=None, **options):
    return steploop.run(recipe, **{"progress": "none", "log_every": 1, "device": "cpu", **options})


def plain(path):
    timed = {"time_s", "samples_per_s", "data_wait", "eval_s"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines(path)]


def test_a_file_a_function_and_a_recipe_train_what_the_command_line_trains(tmp_path):
    """To the last bit, with the same lines in the log."""
    assert (
        call(["run", POINTS, "--out", "line", "--quiet", "--no-tune", "--device", "cpu", "--log-every", "1"])
        == 0
    )
    made = build(device=CPU)
    ways = {
        "file": POINTS,
        "path": __import__("pathlib").Path(POINTS),
        "function": build,
        "recipe": made,
        "again": made,
    }
    for name, recipe in ways.items():
        summary = run(recipe, out=name)
        assert (summary.state, summary.run) == ("finished", name)
        assert digest(name) == digest("line"), name
        assert plain(name) == plain("line"), name
    assert steploop.run.__module__ == "steploop.runs.from_python"


def test_settings_are_checked_by_name_and_type_before_anything_is_made(tmp_path):
    for recipe in (POINTS, build):
        name = "points_recipe" if recipe is POINTS else "build"
        with pytest.raises(
            ConfigError, match=f"{name} has no setting 'learning_rat'. Did you mean learning_rate?"
        ):
            run(recipe, learning_rat=1)
        with pytest.raises(ConfigError, match=f"{name}: epochs must be int, but got 'many'"):
            run(recipe, epochs="many")
    with pytest.raises(ConfigError, match=r"recipe has no setting 'learning_rate'. There are: epochs\."):
        run(build(device=CPU), learning_rate=1)
    with pytest.raises(ConfigError, match='progress must be "auto", "plain" or "none", but is \'loud\''):
        run(build, progress="loud")
    with pytest.raises(ConfigError, match=r"steploop.run: loggers must be a sequence of loggers, but is one"):
        run(build, loggers=print)
    with pytest.raises(ConfigError, match="device='meta', but the state of this Recipe is on cpu"):
        run(build(device=CPU), device="meta")
    assert list(tmp_path.iterdir()) == []


def with_required(*, width, device):
    assert width == 3
    return build(device=device)


def positional(width, /):
    raise AssertionError(width)


def many(*names):
    raise AssertionError(names)


def no_recipe():
    return 5


def of_a_config(config: points_recipe.Config, device):
    return points_recipe.build(config, device)


def of_what_config(config):
    raise AssertionError(config)


def clashing(progress=1, csv=True):
    raise AssertionError(progress, csv)


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (
            with_required,
            {},
            r"with_required needs a value for width. Give it by name: steploop.run\(with_required, width=",
        ),
        (positional, {}, "positional: each setting needs a name, but the function takes width"),
        (many, {}, "many: each setting needs a name, but the function takes names"),
        (no_recipe, {}, "no_recipe must return a steploop.recipe.Recipe, but returned int"),
        (of_what_config, {}, "of_what_config takes a config, but it is not known of which class"),
        (clashing, {"csv": True}, "csv is an option of steploop.run and a setting of clashing too"),
        (lambda model=MODEL: model, {}, r"model=Linear\(.*cannot be written to config.json"),
    ],
)
def test_a_function_that_cannot_be_a_recipe_is_refused_by_name(function, options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        run(function, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_a_config_or_with_required_settings_is_run_and_gone_on_with(tmp_path):
    assert run(of_a_config, epochs=1, out="a").epoch == 1
    assert json.loads((tmp_path / "a" / "config.json").read_bytes())["config"]["epochs"] == 1
    assert run(with_required, width=3, limit_steps=2, out="b").ending == "limit"
    assert run(with_required, resume="b").state == "finished"


def test_a_run_goes_on_where_it_was_begun_and_the_command_line_says_where_that_is(tmp_path, capsys):
    run(build, out="whole")
    assert run(build, out="part", limit_steps=5).ending == "limit"
    assert call(["resume", "part", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "This run was begun from Python, and no file holds its recipe. Go on with it there" in err
    assert f"steploop.run(RECIPE, resume={str(tmp_path / 'part')!r})" in err
    assert run(build, resume="part").state == "finished"
    assert digest("part") == digest("whole")
    assert (
        "def build(epochs=2, learning_rate: float = 0.1, device=None):"
        in (tmp_path / "part" / "recipe.py").read_text()
    )
    run(POINTS, out="file", limit_steps=5)
    assert run(resume="file").state == "finished"
    assert digest("file") == digest("whole")


def test_a_cell_that_is_run_again_says_what_to_do(tmp_path):
    run(build, out="a", epochs=1)
    with pytest.raises(RunExistsError) as caught:
        run(build, out="a", epochs=1)
    assert str(caught.value).startswith(
        "a holds a run already. Go on with it by steploop.run(..., resume='a'), or give another"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(
        RunExistsError, match=r"holds 'thesis.txt' and is not empty already. Give another directory as out="
    ):
        run(build, out="mine", epochs=1)
    with pytest.raises(ConfigError, match="--out and --resume are both given"):
        run(build, out="b", resume="a")
    with pytest.raises(ConfigError, match="Which recipe"):
        run()


def test_ctrl_c_leaves_a_run_that_can_be_gone_on_with(tmp_path, capsys):
    """The signal is a real one; the handler that was there before is back afterwards."""
    handler = signal.getsignal(signal.SIGINT)
    run(build, out="whole")

    def interrupting(step, _):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    summary = run(build, out="part", loggers=[interrupting], progress="plain")
    assert (summary.state, summary.exit_code) == ("interrupted", 130)
    assert signal.getsignal(signal.SIGINT) is handler
    assert capsys.readouterr().out.endswith(
        f"Interrupted after step {summary.steps_attempted}, which is saved. Go on with: steploop.run(RECIPE, resume='part')\n"
    )
    assert "resume=&#x27;part&#x27;" in summary._repr_html_()
    assert run(build, resume="part").state == "finished"
    assert digest("part") == digest("whole")


def test_a_second_ctrl_c_raises_and_ends_no_notebook(tmp_path):
    def impatient(step, _):
        if step == 5:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(build, out="part", loggers=[impatient], checkpoint_every=2)
    assert run(build, resume="part").state == "finished"


def test_ctrl_c_while_the_recipe_is_built_leaves_nothing(tmp_path):
    def slow():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        run(slow, out="a")
    assert list(tmp_path.iterdir()) == []


def test_values_show_themselves_in_a_notebook(tmp_path):
    summary = run(build, out="<b>", epochs=2)
    page = summary._repr_html_()
    assert page.count("<svg") == 3  # training loss, loss and accuracy
    assert str(summary) in page.replace("&#x27;", "'")
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    made = attrs.evolve(build(device=CPU), data="a <table>")._repr_html_()
    for words in ("parameters", "fp16 on cpu", "2 epochs of 7 batches", "loss (min)", "a &lt;table&gt;"):
        assert words in made
    assert isinstance(build(device=CPU), Recipe)


class Display:
    """Stands in for IPython: keeps what each output showed last, and how often it was renewed."""

    def __init__(self):
        self.outputs, self.renewed = [], 0

    def display(self, data, *, raw, display_id):
        self.outputs.append(data)
        return self

    def update(self, data, *, raw):
        self.outputs[-1], self.renewed = data, self.renewed + 1


def test_in_a_notebook_one_output_is_renewed_without_cursor_codes(tmp_path, monkeypatch, capsys):
    shown = Display()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    assert in_notebook()
    assert isinstance(from_python._screen("auto"), NotebookScreen)
    run(build, out="a", progress="auto")
    assert len(shown.outputs) == 1
    assert shown.renewed > 0
    text = shown.outputs[0]["text/plain"]
    assert text.startswith("epoch 2/2 step 13  loss ")
    assert "epoch 2 step 13: loss " in text
    assert "value='1.000'" in shown.outputs[0]["text/html"]
    assert "\x1b" not in text + capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


def test_the_screen_of_a_script_is_that_of_the_command_line(tmp_path, capsys):
    train(tmp_path / "quiet", {"epochs": 1})
    run(build, out="silent", epochs=1, progress=False)
    assert capsys.readouterr().out == ""
    run(build, out="a", epochs=1, progress="plain")
    assert "epoch 1 step 7: loss" in capsys.readouterr().out
