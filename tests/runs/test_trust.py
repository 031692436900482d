"""Running the recipe in another user's directory: refused until the user says --trust."""

import os

import pytest
from running import train

from steploop.errors import ConfigError
from steploop.runs.trust import require_trust
from steploop.tools.cli import call


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("trust") / "run"
    train(path, {"epochs": "1"})
    return path


@pytest.fixture
def as_another_user(monkeypatch):
    """Whoever the tests run as, the files that they make belong to somebody else."""
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


def test_the_user_of_the_files_is_never_asked(run):
    require_trust(run, trust=False, command="resume")


@pytest.mark.parametrize("command", [["resume"], ["run", "--resume"]])
def test_resuming_a_run_of_another_user_asks_for_trust(run, command, as_another_user, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert call([*command, str(run), "--quiet", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert f"{run}/recipe.py belongs to " in err
    assert "runs the recipe in this directory as you. Read it first; if you trust it, give --trust." in err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert call([*command, str(run), "--quiet", "--device", "cpu", "--trust"]) == 0


def test_replaying_a_capsule_of_another_user_asks_for_trust(tmp_path, as_another_user, capsys):
    (tmp_path / "capsule.json").write_text("{}")
    assert call(["replay", str(tmp_path)]) == 2
    assert "steploop replay runs the recipe in this directory as you" in capsys.readouterr().err
    assert call(["replay", str(tmp_path), "--trust"]) != 2  # it goes on, and finds no capsule of steploop's


def test_a_link_to_another_users_recipe_is_a_file_of_theirs(tmp_path, monkeypatch):
    """The owner of the file counts, not only the owner of the link."""
    theirs = tmp_path / "theirs.py"
    theirs.write_text("")
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "recipe.py"
    link.symlink_to(theirs)
    if os.geteuid() != 0:
        pytest.skip("only root may give a file away")
    os.lchown(theirs, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        require_trust(tmp_path / "run", trust=False, command="resume")


def test_the_directory_itself_may_belong_to_another(tmp_path):
    """An administrator makes the mount point, the user the run in it."""
    if os.geteuid() != 0:
        pytest.skip("only root may give a directory away")
    (tmp_path / "config.json").write_text("{}")
    os.chown(tmp_path, 12345, 12345)
    require_trust(tmp_path, trust=False, command="resume")


@pytest.mark.parametrize("command", ["resume", "replay"])
def test_the_help_says_that_the_recipe_in_the_directory_is_run(command, capsys):
    assert call([command, "--help"]) == 0
    assert "This runs the recipe in" in " ".join(capsys.readouterr().out.split())
