"""Which modules of a recipe's folder a run records: those that it imports, however it does; and any change of them."""

import sys

import pytest

from steploop.recipe.imported_modules import imported_modules


def found(folder, source):
    return sorted(imported_modules(source.encode(), folder))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name, text in {
        "first": "import second\n", "second": "", "third": "import second\n", "unused": "",
        "deep/__init__": "", "deep/a": "from . import b\n", "deep/b": "from .er import c\n", "deep/er/__init__": "from .. import d\n",
        "deep/er/c": "", "deep/d": "",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch, os", []),
        ("import first", ["first", "second"]),
        ("from first import x", ["first", "second"]),
        ("import first as f, third", ["first", "second", "third"]),
        ("def build():\n    import third", ["second", "third"]),
        ("if True:\n    from third import *", ["second", "third"]),
        ("import deep.d", ["deep", "deep.d"]),
        ("from deep import a", ["deep", "deep.a", "deep.b", "deep.d", "deep.er", "deep.er.c"]),
        ("from deep.er import c", ["deep", "deep.d", "deep.er", "deep.er.c"]),
        ("from .first import x", ["first", "second"]),
        ("import missing", []),
        ("this is no Python", []),
    ],
)
def test_what_is_imported_from_the_folder_is_found(source, names, folder):
    assert found(folder, source) == names


def test_a_changed_text_has_another_digest_wherever_it_is_imported(folder):
    before = imported_modules(b"from deep import a", folder)
    (folder / "deep" / "er" / "c.py").write_text("X = 1\n")
    after = imported_modules(b"from deep import a", folder)
    assert [name for name in before if before[name] != after[name]] == ["deep.er.c"]


def test_a_name_that_python_takes_from_elsewhere_and_steploop_itself_are_left_out(folder, monkeypatch):
    (folder / "json.py").write_text("")
    (folder / "steploop.py").write_text("")
    assert "json" in sys.modules
    assert found(folder, "import json, steploop") == []


def test_a_circle_and_a_source_in_another_encoding_end(folder):
    (folder / "first.py").write_bytes(
        "# -*- coding: latin-1 -*-\nimport third\nX = '\xe9'\n".encode("latin-1")
    )
    (folder / "third.py").write_text("import first\n")
    assert found(folder, "import first") == ["first", "third"]
