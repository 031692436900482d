"""Show how far a download or a decoding is: by a callback, or by a bar."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "say", "showing"]

_LINE_EVERY_S = 10.0

Progress = Callable[[str, int, int], None]
"""``(what, done, total)``, called now and then, and at the end with ``done == total``."""


class _Lines:
    """A line on stderr now and then, for what takes longer than that: in a log, a bar would be thousands of lines."""

    def __init__(self) -> None:
        self._said_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._said_s = time.monotonic()
            say(f"{what}: {done / total:.0%}" if total else what)


def say(text: str) -> None:
    """Tell the user what is waited for, on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextmanager
def showing(progress: Progress | None) -> Iterator[Progress]:
    """Return the callback, or a temporary bar on stderr if that is a terminal, or a line now and then."""
    if progress is not None:
        yield progress
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
