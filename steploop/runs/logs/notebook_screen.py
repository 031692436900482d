"""Shows a run in a notebook: one line that moves, without a terminal's cursor codes."""

import importlib
import math
import sys
import time
from collections.abc import Mapping
from html import escape
from typing import Any

from steploop.runs.logs.progress_text import format_metrics, format_step

__all__ = ["NotebookScreen", "in_notebook"]

_EVERY_S = 0.2  # each renewal is a message to the browser


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class NotebookScreen:
    """One output that is renewed: the newest log point and the newest evaluation; notes stand above it."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._step, self._evaluation = "", ""
        self._done = 0.0
        self._shown_s = -math.inf

    def note(self, text: str) -> None:
        """Say something above the line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:
        """Renew the line, five times a second at most."""
        head, parts = format_step(line, left_s)
        self._step, self._done = "  ".join((head, *parts.values())), min(done, 1.0)
        self._show_now_and_then()

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Renew the line."""
        self._evaluation = format_metrics(line)
        self._show_now_and_then()

    def close(self) -> None:
        """Show the last of it."""
        if self._step or self._evaluation:
            self._show()

    def _show_now_and_then(self) -> None:
        if time.monotonic() - self._shown_s >= _EVERY_S:
            self._show()

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        text = "   ".join(filter(None, (self._step, self._evaluation)))
        data = {
            "text/plain": text,
            "text/html": f"<code><progress value='{self._done:.3f}' max='1'></progress> {escape(text)}</code>",
        }
        if self._handle is None:
            display = importlib.import_module(
                "IPython.display"
            ).display  # there is a kernel, so it is installed
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)
