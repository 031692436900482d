"""Every Python block of the pages runs, as a reader would run it, and prints what the page says it prints."""

import contextlib
import importlib.util
import io
import os
import random
import re
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

import steploop
from steploop.tools.commands.docs import read_pages

PAGES = Path(steploop.__file__).parent / "docs"
# a Python block, and the text block of its output if one follows at once
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
# the first line of a block that the other blocks of its page begin with
SHARED = "# Every example on this page begins with this."
# the first line of a block that needs packages beyond those of the test extra
NEEDS = re.compile(r"# needs: (.+)")


def blocks():
    for name in read_pages():
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        shared = ""
        for match in BLOCK.finditer(text):
            program = placed(match[1], text.count("\n", 0, match.start()) + 1)
            if program.lstrip().startswith(SHARED):
                shared = program
            line = program.count("\n") - match[1].count("\n") + 1
            yield pytest.param(name, shared, program, match[2], id=f"{name}-{line}")


def placed(program, line):
    """The program below so many empty lines, so that an error names the line of the page."""
    return "\n" * line + program


@pytest.mark.parametrize(("page", "shared", "program", "shown"), list(blocks()))
def test_a_block_runs(page, shared, program, shown, tmp_path, monkeypatch):
    """In an empty folder, in a namespace that holds nothing but what its page shares."""
    if needs := NEEDS.match(program.lstrip()):
        warnings.simplefilter("ignore", FutureWarning)  # what other libraries plan is not the page's error
        warnings.simplefilter("ignore", DeprecationWarning)
        missing = [name for name in needs[1].split(", ") if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    printed, namespace = io.StringIO(), {"__name__": "page"}
    python, name = random.getstate(), str(PAGES / f"{page}.md")
    with torch.random.fork_rng(), mock.patch.dict(os.environ), contextlib.redirect_stdout(printed):
        torch.manual_seed(0)
        for part in dict.fromkeys([shared, program]):
            exec(compile(part, name, "exec"), namespace)
    random.setstate(python)
    if shown is not None:
        assert printed.getvalue() == shown


@pytest.mark.parametrize("page", list(read_pages()))
def test_a_page_begins_with_its_title_and_a_paragraph_that_says_what_it_is_about(page):
    """`steploop docs` lists that paragraph, so it is a line."""
    title, paragraph, _ = read_pages()[page].split("\n\n", 2)
    assert re.fullmatch(r"# .{3,60}", title)
    assert re.fullmatch(r"[A-Z`].{20,120}[.:]", paragraph)
