"""What the command line says before anything runs: help, completion, the nearest name, numbers of runs."""

import os
import re
import subprocess
import sys

import attrs
import pytest
import typer
from running import POINTS, changed

from steploop.recipe.recipe_paths import find_recipe
from steploop.recipe.written_settings import WrittenSetting, settings_in
from steploop.tools.application import app
from steploop.tools.cli import call
from steploop.tools.commands.completion import complete_recipe, complete_run
from steploop.tools.commands.terminals import definitions

COMMANDS = sorted(typer.main.get_command(app).commands)


def says(capsys, monkeypatch, *words, columns=80):
    """Exit code, stdout, stderr of a command in a window of that width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code = call([*words])
    return (code, *capsys.readouterr())


def test_a_bare_run_names_the_recipes_and_what_else_there_is(capsys, monkeypatch):
    code, out, err = says(capsys, monkeypatch, "run")
    assert (code, out) == (2, "")
    assert err.startswith("steploop: Which recipe? Give a file, or the name of a shipped one:\n")
    assert re.search(r"^  mnist +A two-layer perceptron", err, re.MULTILINE)
    assert "steploop run mnist --help" in err
    assert [line for line in err.splitlines()[-2:] if len(line) > 80] == []


def test_a_mistyped_recipe_is_named_before_torch_is_loaded(tmp_path):
    (tmp_path / "mine.py").write_text("")
    command = "import sys; from steploop.tools.cli import call; print(call(['run', sys.argv[1]]), 'torch' in sys.modules)"
    for given, meant in (("mnits", "mnist"), ("mine", "mine.py")):
        done = subprocess.run(
            [sys.executable, "-c", command, given], check=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout == "2 False\n"
        assert done.stderr.endswith(f"neither a file nor a shipped recipe. Did you mean {meant}?\n")


def test_a_compile_option_at_the_end_stands_alone(capsys):
    assert call(["run", POINTS, "--set", "x=1", "--compile"]) == 2
    assert "has no setting 'x'" in capsys.readouterr().err


def test_every_command_is_summed_up_in_80_columns(capsys, monkeypatch):
    code, out, _ = says(capsys, monkeypatch, "--help")
    commands = out.partition("Commands:\n")[2].splitlines()
    assert code == 0
    assert sorted(line.split()[0] for line in commands) == COMMANDS
    assert [line for line in commands if line.endswith("...") or len(line) > 79] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    code, out, _ = says(capsys, monkeypatch, command, "--help")
    assert code == 0
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_the_option_that_shows_tracebacks_and_completion_are_listed(capsys, monkeypatch):
    _, out, _ = says(capsys, monkeypatch, "--help")
    assert {"--debug", "--version", "--install-completion", "--show-completion"} <= {
        *re.findall(r"--[\w-]+", out)
    }


def test_the_options_of_a_run_stand_in_groups(capsys, monkeypatch):
    _, out, _ = says(capsys, monkeypatch, "run", "--help")
    groups = dict(re.findall(r"^(\w[^\n]*):\n((?:  [^\n]*\n?)+)", out, re.MULTILINE))
    assert [*groups] == [
        "Arguments",
        "Options",
        "Run directory",
        "Going on with a run",
        "First weights",
        "Logs",
        "Ranks",
    ]
    assert "--wandb" in groups["Logs"]
    assert "--require-exact" in groups["Going on with a run"]
    assert {"--set", "--epochs", "--help"} <= {*re.findall(r"--[\w-]+", groups["Options"])}


@pytest.mark.parametrize(
    "words", [["run", "mnist", "--help"], ["check", "-h", "mnist"], ["bench", "--help", "mnist"]]
)
def test_help_after_a_recipe_lists_its_settings_with_their_comments(words, capsys, monkeypatch):
    code, out, _ = says(capsys, monkeypatch, *words)
    settings = re.search(
        r"^Settings of mnist, given as --set NAME=VALUE:\n((?:  .*\n)+)", out, re.MULTILINE
    ).group(1)
    assert code == 0
    assert re.search(r"^  batch_size=64 +images$", settings, re.MULTILINE)
    assert len(re.findall(r"^  \w+=", settings, re.MULTILINE)) == 9


def test_help_of_resume_lists_the_settings_of_the_run(tmp_path, capsys, monkeypatch):
    (tmp_path / "recipe.py").write_bytes(find_recipe("gan").read_bytes())
    _, out, _ = says(capsys, monkeypatch, "resume", str(tmp_path), "--help")
    assert "beta1=0.5" in out


def test_help_after_a_recipe_that_there_is_not_says_so(capsys, monkeypatch):
    code, out, _ = says(capsys, monkeypatch, "run", "minst", "--help")
    assert code == 0
    assert "There is no recipe 'minst'" in out
    assert "mnist?" in out


def test_a_file_of_settings_is_read_without_running_it(tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_text(
        "import attrs\nraise SystemExit('it ran')\n\n@attrs.frozen\nclass Base:\n    seed: int = 1_000  # of all\n\n\n"
        "@attrs.frozen\nclass Config(Base):\n    # metres\n    # above the sea\n    height: float = 5e-1\n\n"
        "    # a remark\n\n    kind: Literal['a', 'b'] = attrs.field(default='a', validator=None)\n"
        "    sizes: tuple[int, ...] = (1, 2)\n    rate: float | None = None\n    path: Path = Path('x')  # where\n"
        "    def method(self): ...\n"
    )
    assert settings_in(recipe) == [
        WrittenSetting("seed", "1000", "of all"), WrittenSetting("height", "0.5", "metres above the sea"),
        WrittenSetting("kind", "a", "a or b"), WrittenSetting("sizes", "1,2", ""),
        WrittenSetting("rate", "none", ""), WrittenSetting("path", "Path('x')", "where"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--epoch", "There is no option --epoch. Did you mean --epochs?"),
        ("--learning-rate", "learning_rate is a setting of mnist: give --set learning_rate=VALUE."),
        ("--zzz", "There is no option --zzz. steploop run --help lists those that there are."),
    ],
)
def test_an_option_that_there_is_not_names_what_was_meant(option, sentence, capsys, monkeypatch):
    code, out, err = says(capsys, monkeypatch, "run", "mnist", option)
    assert (code, out) == (2, "")
    assert sentence in err


def completed(*words):
    """What a shell is offered for the last of the words, in a process of its own."""
    told = {
        "_STEPLOOP_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["steploop", *words]),
        "COMP_CWORD": str(len(words)),
    }
    program = "import sys\nfrom steploop.tools.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_shell_completes_commands_and_the_settings_of_a_recipe_without_loading_torch():
    assert sorted(completed("re")) == [name for name in COMMANDS if name.startswith("re")]
    assert completed("run", "mnist", "--set", "epochs=3", "--set", "l") == [
        "learning_rate=0.01",
        "l1=0.0",
        "l2=0.0",
    ]


def test_recipes_and_runs_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/own-1", "runs/own-2", "elsewhere/own-3", "runs/none"):
        (tmp_path / name).mkdir(parents=True)
        if "none" not in name:
            (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "mine.py").touch()
    assert [name if isinstance(name, str) else name[0] for name in complete_recipe("m")] == [
        "mnist",
        "mine.py",
    ]
    assert complete_run("")[:2] == ["runs/own-1", "runs/own-2"]
    assert complete_run("runs/o") == ["runs/own-1", "runs/own-2"]
    assert complete_run("elsewhere/") == ["elsewhere/own-3"]
    assert complete_run("e") == ["elsewhere/"]


def test_a_run_that_fails_before_its_first_step_uses_up_no_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(made, _):
        def train_step(state, batch):
            raise ValueError("odd")

        return attrs.evolve(made, train_step=train_step)

    recipe = changed(tmp_path, broken)
    for words in ([], ["--out", "named"]):
        with pytest.raises(ValueError, match="odd"):
            call(["run", recipe, "--quiet", "--device", "cpu", "--no-tune", *words])
    assert not (tmp_path / "runs").exists()
    assert '"failed"' in (tmp_path / "named" / "status.json").read_text()


def test_a_text_that_is_too_long_for_the_terminal_goes_on_below_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    rows = [("a", "one two three four five six"), ("bcd", "seven")]
    assert definitions(rows) == ["a    one two three four five six", "bcd  seven"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert definitions(rows) == ["a    one two three four five", "     six", "bcd  seven"]
