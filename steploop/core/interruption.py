"""One question that whatever takes long asks in between: has this run been told to stop?

A signal handler only sets a flag. The flag is looked at between two steps, between two batches of an evaluation and
while waiting for data; the last two ask here, because they know no run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Interrupted", "check_interruption", "watched_by"]


class Interrupted(BaseException):  # no Exception: like KeyboardInterrupt, it must pass `except Exception`
    """The run was told to stop by a signal; raised only where nothing is half done.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


_watchers: list[Callable[[], None]] = []


def check_interruption() -> None:
    """Raise Interrupted if a run that waits for us was told to stop; without a run, nothing."""
    for watcher in _watchers:
        watcher()


@contextmanager
def watched_by(watcher: Callable[[], None]) -> Iterator[None]:
    """Let ``watcher`` be called by every ``check_interruption()`` inside; it raises Interrupted to stop."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)
