"""Every Python block of the pages runs, as a reader would run it, and prints what the page says it prints."""

import contextlib
import importlib.util
import io
import random
import re
from pathlib import Path

import pytest
import torch

import steploop
from steploop.tools.commands.docs import read_pages

PAGES = Path(steploop.__file__).parent / "docs"
# a Python block, and the text block of its output if one follows at once
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
# the first line of a block that needs packages beyond those of the test extra
NEEDS = re.compile(r"# needs: (.+)")


def blocks():
    for name in read_pages():
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 2
            yield pytest.param(name, line, *match.groups(), id=f"{name}-{line}")


@pytest.mark.parametrize(("page", "line", "program", "shown"), list(blocks()))
def test_a_block_runs(page, line, program, shown, tmp_path, monkeypatch):
    """A block stands by itself: it runs in an empty folder, in a namespace of its own."""
    if needs := NEEDS.match(program):
        missing = [name for name in needs[1].split(", ") if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    printed, namespace = io.StringIO(), {"__name__": "page"}
    python = random.getstate()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        torch.manual_seed(0)
        exec(compile("\n" * (line - 1) + program, str(PAGES / f"{page}.md"), "exec"), namespace)
    random.setstate(python)
    if shown is not None:
        assert printed.getvalue() == shown


@pytest.mark.parametrize("page", list(read_pages()))
def test_a_page_begins_with_its_title_and_a_paragraph_that_says_what_it_is_about(page):
    """`steploop docs` lists that paragraph, so it is a line."""
    title, paragraph, _ = read_pages()[page].split("\n\n", 2)
    assert re.fullmatch(r"# .{3,60}", title)
    assert re.fullmatch(r"[A-Z`].{20,120}[.:]", paragraph)
