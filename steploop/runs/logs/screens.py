"""What a run shows: a live line in a terminal, a plain line every few seconds elsewhere, or nothing."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from steploop.runs.logs.progress_text import fitting, format_metrics, format_step

__all__ = [
    "LiveScreen",
    "PlainScreen",
    "QuietScreen",
    "Screen",
    "choose_screen",
]

_PLAIN_EVERY_S = 5.0
_LIVE_EVERY_S = 0.1
_SHORTEST_BAR = 4


class Screen(Protocol):
    """Where a run's progress is shown."""

    def note(self, text: str) -> None:
        """Say something, once."""

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:
        """Show a log point.

        Args:
            line: as in metrics.jsonl, with "epochs", the number of them.
            done: how much of the run is done, 0..1.
            left_s: seconds that are left.
        """

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Show the metrics of an evaluation."""

    def close(self) -> None:
        """Give the terminal back."""


class _Line:
    """The newest log point with a bar as wide as the terminal leaves room for."""

    def __init__(self) -> None:
        self.head, self.done = "", 0.0
        self.parts: Mapping[str, str] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", "-") if options.ascii_only else ("━", "╌")
        tail = fitting(self.parts, options.max_width - len(self.head) - 1)
        room = options.max_width - len(self.head) - len(tail) - 2
        text = Text(self.head, style="bold", no_wrap=True, overflow="ellipsis", end="")
        if room >= _SHORTEST_BAR:
            reached = round(room * min(self.done, 1.0))
            text.append(" ").append(full * reached, "green").append(empty * (room - reached), "dim").append(
                " "
            )
        else:
            text.append(" ")
        yield text.append(tail, "not bold")


class LiveScreen:
    """One line at the bottom of the terminal that follows the run, and a line above it for each evaluation."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = _Line()
        self._live: Live | None = None
        self._shown_s = -math.inf

    def note(self, text: str) -> None:
        """Say something above the line."""
        self._console.print(Text(text))

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:
        """Renew the line, ten times a second at most."""
        now = time.monotonic()
        if now - self._shown_s < _LIVE_EVERY_S:
            return
        self._shown_s = now
        self._line.head, self._line.parts = format_step(line, left_s)
        self._line.done = done
        if self._live is None:
            self._live = Live(self._line, console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.refresh()

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A line that stays."""
        self._console.print(Text(format_metrics(line), style="green" if line.get("best") else ""))

    def close(self) -> None:
        """Take the line away and show the cursor."""
        if self._live is not None:
            self._live.stop()
            self._live = None


class PlainScreen:
    """Whole lines, for a file or a pipe: the first log point, then one every few seconds."""

    def __init__(self) -> None:
        # a pipe gets colours only where FORCE_COLOR asks for them
        self._console = Console(highlight=False, soft_wrap=True)
        self._shown_s = -math.inf

    def note(self, text: str) -> None:
        """Say something."""
        self._print(text)

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:  # noqa: ARG002  (the protocol's)
        """A line, if the last one is old enough."""
        now = time.monotonic()
        if now - self._shown_s >= _PLAIN_EVERY_S:
            self._shown_s = now
            head, parts = format_step(line, left_s)
            self._print("  ".join((head, *parts.values())))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A line for each."""
        self._print(format_metrics(line), "green" if line.get("best") else "")

    def close(self) -> None:
        """Nothing is held back."""

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)
        sys.stdout.flush()


class QuietScreen:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:
        """Nothing."""

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def choose_screen(*, quiet: bool) -> Screen:
    """The screen that suits where the output goes: FORCE_COLOR makes no terminal of a pipe."""
    if quiet:
        return QuietScreen()
    console = Console(highlight=False)
    return LiveScreen(console) if sys.stdout.isatty() and not console.is_dumb_terminal else PlainScreen()
