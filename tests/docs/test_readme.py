"""The README runs, fits on a few screens, and names every page, command and recipe that there is."""

import contextlib
import io
import re
import tomllib
from pathlib import Path

import pytest
import typer

from steploop.compilation.aten_graph import TORCH_RELEASES
from steploop.recipe import shipped_recipes
from steploop.tools.application import app
from steploop.tools.commands.docs import read_pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_program_prints_what_is_shown():
    program, shown = re.search(r"```python\n(.*?)```\s+```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    assert printed.getvalue() == shown


def test_the_versions_that_it_names_are_those_that_count():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(word for word in project["dependencies"] if word.startswith("torch>"))
    oldest, python = re.search(r">=([\d.]+)", torch).group(1), project["requires-python"].removeprefix(">=")
    assert (
        f"torch {oldest} or newer, Python {python} or newer; `steploop.compile` needs torch {' or '.join(TORCH_RELEASES)}."
        in README
    )


def test_it_can_be_read_in_a_few_minutes():
    assert 120 <= len(README.splitlines()) <= 180


@pytest.mark.parametrize(
    "document",
    ["README.md", ".github/CONTRIBUTING.md", *(f"steploop/docs/{name}.md" for name in read_pages())],
)
def test_a_link_to_a_file_leads_to_one(document):
    """Of a page that ships with the package, only links to other pages do."""
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).is_file(), f"{document} links to {target}"
            if "steploop/docs" in document:
                assert "/" not in target


def test_every_page_is_linked():
    assert set(re.findall(r"\(steploop/docs/([\w-]+)\.md\)", README)) == set(read_pages())


def test_every_command_is_in_the_table():
    commands = typer.main.get_command(app).commands
    table = README.partition("## The command line")[2].partition("\n## ")[0]
    rows = " ".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE))
    assert [name for name in commands if not re.search(rf"[` ]{name}\b", rows)] == []


def test_every_recipe_is_in_the_table():
    named = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert set(shipped_recipes()) <= named
