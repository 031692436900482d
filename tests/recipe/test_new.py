"""``steploop new``: a copy that runs, is called what it was asked to be called, and overwrites nothing."""

import ast

import pytest

from steploop import __version__
from steploop.recipe.recipe_files import load_recipe_file
from steploop.recipe.recipe_paths import find_recipe, shipped_recipes
from steploop.tools.cli import call
from steploop.tools.commands.new import adapted


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_a_copy_of_each_recipe_is_one_that_loads(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(["new", "my_task", "--from", recipe]) == 0
    assert (
        capsys.readouterr().out
        == f"my_task.py: a copy of {recipe}. Change it, then: steploop run my_task.py\n"
    )
    copy, original = tmp_path / "my_task.py", find_recipe(recipe)
    assert load_recipe_file(copy).config_class().epochs >= 1

    header = ast.get_docstring(ast.parse(copy.read_text(encoding="utf-8")))
    assert "steploop run my_task.py" in header
    assert f"{recipe}.py" not in header
    assert header.endswith(f"Begun as a copy of {recipe} (steploop {__version__}); nothing is measured yet.")
    assert "Measured" not in header
    bodies = [path.read_text(encoding="utf-8").split('"""', 2)[2] for path in (copy, original)]
    assert bodies[0] == bodies[1]


def test_what_exists_is_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("precious")
    assert call(["new", "mine"]) == 2
    assert (
        "mine.py exists and was not changed. Choose another name, or move it away." in capsys.readouterr().err
    )
    assert (tmp_path / "mine.py").read_text() == "precious"


def test_a_path_is_followed_and_a_recipe_of_ones_own_copied(tmp_path, capsys):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    assert call(["new", str(first), "--from", "gan"]) == 0
    assert call(["new", str(second), "--from", str(first)]) == 0
    text = second.read_text(encoding="utf-8")
    assert f"steploop run {second.as_posix()}" in text
    assert load_recipe_file(second).name == "second"
    capsys.readouterr()


@pytest.mark.parametrize("name", ["2nd", "my-recipe", "", "a b.py"])
def test_a_name_that_python_cannot_import_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(["new", name]) == 2
    assert "A recipe's name must be a Python identifier" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_is_refused_with_the_nearest_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(["new", "mine", "--from", "mnits"]) == 2
    error = capsys.readouterr().err
    assert "There is no recipe 'mnits'" in error
    assert "mnist" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert call(["new", str(tmp_path / "nowhere" / "mine.py")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_only_the_header_is_adapted(tmp_path):
    text = '"""A.\n\n    steploop run recipes/a.py --set x=1\n\nMeasured: 99% by recipes/a.py,\nin 3 s.\n\nMore.\n"""\n\nMeasured = "recipes/a.py"\n'
    found = adapted(text, "a", tmp_path / "b.py")
    claim = f"Begun as a copy of a (steploop {__version__}); nothing is measured yet."
    expected = f'"""A.\n\n    steploop run {(tmp_path / "b.py").as_posix()} --set x=1\n\n{claim}\n\nMore.\n"""\n\nMeasured = "recipes/a.py"\n'
    assert found == expected


def test_a_header_at_the_end_of_which_the_measurement_stands_stays_closed(tmp_path):
    text = '"""A.\n\nMeasured: 99%,\nin 3 s.\n"""\n\nx = 1\n'
    found = adapted(text, "a", tmp_path / "b.py")
    assert (
        found
        == f'"""A.\n\nBegun as a copy of a (steploop {__version__}); nothing is measured yet.\n"""\n\nx = 1\n'
    )
