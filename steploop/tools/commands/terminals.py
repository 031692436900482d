"""Measure the terminal."""

import shutil

__all__ = ["window_width"]


def window_width() -> int:
    """Return the width of the terminal in characters; 80 if there is none."""
    return max(shutil.get_terminal_size((80, 24)).columns, 24)
