"""`steploop docs` lists, finds, prints and opens the pages that ship with the package."""

import sys
from pathlib import Path

import pytest
import typer

from steploop.tools.cli import call
from steploop.tools.commands.docs import find_sections, read_pages


def test_without_a_word_each_page_is_listed_with_what_it_is_about(capsys):
    assert call(["docs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line][:-2] == list(read_pages())
    assert next(line for line in lines if line.startswith("speed")).endswith(
        "how to measure it on your machine."
    )


@pytest.mark.parametrize("name", ["speed", "Speed", "speed.md"])
def test_a_page_is_printed_as_it_is_into_a_pipe(name, capsys):
    assert call(["docs", name]) == 0
    assert capsys.readouterr().out == read_pages()["speed"]


def test_a_word_of_a_heading_prints_that_section(capsys):
    assert call(["docs", "exit code"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("## Exit codes\n")
    assert out.count("\n#") == 0
    assert "| 75 | stopped by SIGTERM" in out
    assert out.endswith("\nThe whole page: steploop docs checkpoints\n")


def test_words_are_looked_for_as_they_stand_and_else_one_by_one(capsys):
    assert call(["docs", "exit", "codes"]) == 0
    together = capsys.readouterr().out
    assert together.startswith("## Exit codes\n")
    assert call(["docs", "codes", "exit"]) == 0
    assert capsys.readouterr().out == together
    page = "# One\n\nred and blue\n\n# Two\n\nblue red\n"
    assert [s.heading for s in find_sections({"page": page}, "blue red")] == ["Two"]
    assert [s.heading for s in find_sections({"page": page}, "red blue")] == ["One", "Two"]


def test_a_word_that_many_sections_mention_lists_them(capsys):
    assert call(["docs", "loss"]) == 0
    out = capsys.readouterr().out
    assert {"laws", "mistakes", "speed"} <= {line.split("  ")[0].strip() for line in out.splitlines()}
    assert out.endswith("Print a page with: steploop docs PAGE\n")


def test_a_number_sign_in_a_block_of_code_is_no_heading():
    page = "# Title\n\nText.\n\n```python\n# not a heading\n```\n\n## Next\n"
    assert [s.heading for s in find_sections({"page": page}, "e")] == ["Title", "Next"]


def test_a_word_that_no_page_has_is_refused_with_the_pages(capsys):
    assert call(["docs", "xylophone"]) == 2
    assert capsys.readouterr().err.startswith("steploop: No page mentions 'xylophone'. There are the pages: ")


@pytest.mark.parametrize("words", [["speed"], ["exit code"], []])
def test_a_page_is_opened_as_html(words, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(typer, "launch", opened.append)
    assert call(["docs", "--open", *words]) == 0
    path = capsys.readouterr().out.strip()
    assert opened == [f"file://{path}"]
    text = Path(path).read_text(encoding="utf-8")
    assert "<table>" in text
    assert ("Exit codes</h2>" in text) is (words != ["speed"])


def test_in_a_terminal_it_is_rendered(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert call(["docs", "exit code"]) == 0
    out = capsys.readouterr().out
    assert "## Exit" not in out
    assert "Exit codes" in out
    assert "|" not in out
