"""Make the report of runs again when their files have changed."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from steploop.runs.reading import read_run
from steploop.runs.standing import read_standing
from steploop.tools.report.pages import report

__all__ = ["LivePage", "Page"]

_FILES = ("config.json", "status.json", "metrics.jsonl", "recipe.py")
_SHARE = 0.05  # of the time that may go into making pages, however long the runs are


@attrs.frozen
class Page:
    """A page as it was at some moment.

    Attributes:
        data: HTML as UTF-8.
        tag: another one for another page; an HTTP entity tag.
    """

    data: bytes
    tag: str


class LivePage:
    """The report of some runs, as it is now. Any thread may ask for it.

    It is made when it is asked for and something has changed: nothing is read in between, and the runs do not know of it.

    Args:
        runs: their directories.
        clock: gives seconds.
    """

    def __init__(self, runs: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self._runs = tuple(path.absolute() for path in runs)
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: object = None
        self._page: Page | None = None
        self._not_before = 0.0

    def current(self) -> Page:
        """The page as it is now; for long runs, as it was a moment ago.

        Raises:
            ConfigError: a directory is gone.
        """
        with self._lock:
            begun = self._clock()
            if self._page is not None and begun < self._not_before:
                return self._page
            seen = [_signature(path) for path in self._runs]
            if self._page is None or seen != self._seen:
                text = report([read_run(path) for path in self._runs], live=True)
                data = text.encode("utf-8", "backslashreplace")
                self._page, self._seen = Page(data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'), seen
            ended = self._clock()
            self._not_before = ended + (ended - begun) / _SHARE
            return self._page


def _signature(run: Path) -> object:
    """What changes when the report of a run does: its files, and whether its process lives."""
    files = [run / name for name in _FILES] + sorted(run.glob("*.png"))
    return read_standing(run).state, [_stamp(path) for path in files]


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return None
    return path.name, found.st_mtime_ns, found.st_size, found.st_ino
