"""Measure the terminal, and fit tables into it."""

import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["definitions", "window_width"]


def window_width() -> int:
    """Return the width of the terminal in characters; 80 if there is none."""
    return max(shutil.get_terminal_size((80, 24)).columns, 24)


def definitions(rows: Sequence[tuple[str, str]], *, indent: int = 0) -> list[str]:
    """Two columns as lines; in a terminal, a text that is too long goes on below itself.

    Args:
        rows: a short name and a text.
        indent: characters that will stand before each line.
    """
    names = max((len(name) for name, _ in rows), default=0) + 2
    if not sys.stdout.isatty():  # into a file or a pipe goes every line whole
        return [f"{name:<{names}}{text}" for name, text in rows]
    room = max(window_width() - indent - names, 20)
    lines = []
    for name, text in rows:
        first, *others = textwrap.wrap(text, room) or [""]
        lines += [f"{name:<{names}}{first}".rstrip(), *(" " * names + other for other in others)]
    return lines
