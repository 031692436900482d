"""What a run shows: a live line in a terminal, a plain line every few seconds elsewhere, or nothing."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

__all__ = [
    "LiveScreen",
    "PlainScreen",
    "QuietScreen",
    "Screen",
    "choose_screen",
    "format_metrics",
    "format_step",
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


def _short(value: float | None) -> str:
    """A number in at most seven characters."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:.1e}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value / 1e3:.0f}k"


def _values(line: Mapping[str, Any], key: str) -> str:
    """The number under ``key``, or those of several states, joined."""
    own = [value for name, value in line.items() if name == key or name.endswith(f".{key}")]
    return "/".join(_short(value) for value in own)


def format_step(line: Mapping[str, Any], left_s: float | None = None) -> tuple[str, str]:
    """A log point as text, in two parts between which a bar has room."""
    head = f"epoch {min(line['epoch'] + 1, line['epochs'])}/{line['epochs']} step {line['step']}"
    parts = [f"loss {_values(line, 'loss')}", f"lr {_values(line, 'learning_rate')}"]
    if norm := _values(line, "grad_norm"):
        parts.append(f"grad {norm}")
    if sum(value for name, value in line.items() if name == "skipped" or name.endswith(".skipped")):
        parts.append(f"skipped {_values(line, 'skipped')}")
    parts.append(f"{_rate(line['samples_per_s'])}/s")
    if left_s is not None:
        parts.append(f"{_duration(left_s)} left")
    return head, "  ".join(parts)


def format_metrics(line: Mapping[str, Any]) -> str:
    """An evaluation as text."""
    metrics = "  ".join(f"{name} {_short(value)}" for name, value in line["metrics"].items())
    star = "  (best)" if line.get("best") else ""
    return f"epoch {line['epoch']} step {line['step']}: {metrics}{star}"


class _Line:
    """The newest log point with a bar as wide as the terminal leaves room for."""

    def __init__(self) -> None:
        self.head, self.tail, self.done = "", "", 0.0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        full, empty = ("#", "-") if options.ascii_only else ("━", "╌")
        room = options.max_width - len(self.head) - len(self.tail) - 2
        text = Text(self.head, style="bold", no_wrap=True, overflow="ellipsis", end="")
        if room >= _SHORTEST_BAR:
            reached = round(room * min(self.done, 1.0))
            text.append(" ").append(full * reached, "green").append(empty * (room - reached), "dim").append(
                " "
            )
        else:
            text.append(" ")
        yield text.append(self.tail, "not bold")


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
        self._line.head, self._line.tail = format_step(line, left_s)
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
        self._shown_s = -math.inf

    def note(self, text: str) -> None:
        """Say something."""
        _print(text)

    def train(self, line: Mapping[str, Any], *, done: float, left_s: float | None) -> None:  # noqa: ARG002  (the protocol's)
        """A line, if the last one is old enough."""
        now = time.monotonic()
        if now - self._shown_s >= _PLAIN_EVERY_S:
            self._shown_s = now
            _print("  ".join(format_step(line, left_s)))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A line for each."""
        _print(format_metrics(line))

    def close(self) -> None:
        """Nothing is held back."""


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


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def choose_screen(*, quiet: bool) -> Screen:
    """The screen that suits where the output goes."""
    if quiet:
        return QuietScreen()
    console = Console(highlight=False)
    return LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen()
