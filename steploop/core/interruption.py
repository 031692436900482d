"""Let long operations check whether the run was asked to stop.

A signal handler only sets a flag. The flag is looked at between two steps, between two batches of an evaluation and
while waiting for data; the last two ask here, because they know no run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "check_interruption", "watched_by"]


class Interrupted(BaseException):  # no Exception: like KeyboardInterrupt, it must pass `except Exception`
    """A signal asked the run to stop; raised only where nothing is half done.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


_watchers: list[Callable[[], None]] = []


def check_interruption() -> None:
    """Raise Interrupted if the run was asked to stop; do nothing without a run."""
    for watcher in _watchers:
        watcher()


@contextmanager
def watched_by(watcher: Callable[[], None]) -> Iterator[None]:
    """Call ``watcher`` at every ``check_interruption()`` inside; it raises Interrupted to stop."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
