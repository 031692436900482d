"""Let long operations check whether the run was asked to stop.

A signal handler only sets a flag. The flag is looked at between two steps, between two batches of an evaluation and
while waiting for data; the last two ask here, because they know no run.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = [
    "STOPPING",
    "Interrupted",
    "check_interruption",
    "interruption_behind",
    "sparing_children",
    "watched_by",
]

# SIGHUP: the terminal was closed, or the connection to it was lost
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):  # no Exception: like KeyboardInterrupt, it must pass `except Exception`
    """A signal asked the run to stop; raised only where nothing is half done.

    Attributes:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


_DEEPEST = 100  # causes; a chain of them may be a ring


def interruption_behind(error: BaseException) -> Interrupted | None:
    """The interruption that an error was made of: Python 3.11 makes a RuntimeError of what ``__set_name__`` raises.

    Example:
        >>> try:
        ...     raise RuntimeError("Error calling __set_name__") from Interrupted(15)
        ... except RuntimeError as error:
        ...     interruption_behind(error).signum
        15
    """
    cause: BaseException | None = error
    for _ in range(_DEEPEST):
        if cause is None or isinstance(cause, Interrupted):
            return cause
        cause = cause.__cause__
    return None


_watchers: list[tuple[Callable[[], None], Callable[[], None]]] = []


def check_interruption(*, together: bool = False) -> None:
    """Raise Interrupted if the run was asked to stop; do nothing without a run.

    Args:
        together: whether all ranks of a run ask here, equally often, so that they can agree to stop.
    """
    for alone, agreed in _watchers:
        (agreed if together else alone)()


@contextmanager
def watched_by(watcher: Callable[[], None], agreed: Callable[[], None] | None = None) -> Iterator[None]:
    """Call ``watcher`` at every ``check_interruption()`` inside; it raises Interrupted to stop.

    Args:
        watcher: called by a process on its own.
        agreed: called where all ranks ask together; ``watcher`` too unless given.
    """
    entry = watcher, agreed or watcher
    _watchers.append(entry)
    try:
        yield
    finally:
        _watchers.remove(entry)


@contextmanager
def sparing_children() -> Iterator[None]:
    """Let processes that are started inside outlive a signal to the whole group, as Ctrl-C in a terminal is.

    A run finishes its step, and a compiler that dies in it would be an error of the step. Started processes inherit what
    this thread blocks; the run's own handlers are reached by its other threads, or afterwards. Does nothing outside of a run.
    """
    if not _watchers:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
