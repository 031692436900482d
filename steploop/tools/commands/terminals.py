"""How wide the terminal is."""

import shutil

__all__ = ["window_width"]


def window_width() -> int:
    """Characters to a line: the window's, 80 where the output is no window."""
    return max(shutil.get_terminal_size((80, 24)).columns, 24)
