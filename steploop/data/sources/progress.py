"""Show how far a download or a decoding is: by a callback, or by a bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["Progress", "showing"]

Progress = Callable[[str, int, int], None]
"""``(what, done, total)``, called now and then, and at the end with ``done == total``."""


def _silent(_: str, __: int, ___: int) -> None:
    pass


@contextmanager
def showing(progress: Progress | None) -> Iterator[Progress]:
    """Return the callback, or a temporary bar on stderr if that is a terminal, or silence."""
    if progress is not None:
        yield progress
        return
    if not sys.stderr.isatty():
        yield _silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
