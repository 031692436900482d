"""The table of ten public loops counts the lines that there are."""

import ast
import re
from pathlib import Path

from steploop.tools.commands.docs import read_pages

LOOPS = Path(__file__).parents[1] / "outside" / "public_loops"


def lines_of(node, text):
    """Lines of code, without blank ones, comments and the docstring."""
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return len(code) - len((docstring or "").splitlines())


def counted(path):
    """Lines by hand, and of what comes after: that is ours, but for what compares the two."""
    text = path.read_text(encoding="utf-8")
    body = ast.parse(text).body
    names = [getattr(node, "name", None) for node in body]
    at = names.index("by_hand")
    ours = [node for node, name in zip(body[at + 1 :], names[at + 1 :], strict=True) if name != "result"]
    return lines_of(body[at], text), sum(lines_of(node, text) for node in ours)


def test_each_loop_has_a_row_with_its_lines():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| (\d+) \| (\d+) \|", read_pages()["loops"], re.MULTILINE)
    assert {name: (int(hand), int(here)) for name, hand, here in rows} == {
        path.stem: counted(path) for path in LOOPS.glob("*.py")
    }
