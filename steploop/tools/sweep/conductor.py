"""Keep so many members running until all have had their turn, or a signal comes."""

import time
from collections import deque
from collections.abc import Collection
from typing import Protocol

from steploop.runs.directory_lock import run_owner
from steploop.runs.signals import StopFlag
from steploop.tools.sweep.member_launchers import Handle, Launcher
from steploop.tools.sweep.member_run import TAKEN, is_settled
from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["Grid", "Source", "Watcher", "conduct"]

_POLL_S = 0.1


class Source(Protocol):
    """Says which member comes next."""

    def take(self) -> int | None:
        """The number of a member to start now; None if there is none at the moment."""

    def pending(self) -> bool:
        """Whether members may still have to be started."""

    def ended(self, number: int, code: int) -> None:
        """Note that a member ended with this exit code."""


class Watcher(Protocol):
    """Shows a sweep while it lasts."""

    def ended(self, number: int, code: int) -> None:
        """A member has ended."""

    def show(self, running: Collection[int]) -> None:
        """These members are running."""


class Grid:
    """The members of a grid that are not finished, in their order; each is started once.

    Args:
        sweep: whose.
        leave_out: members that had their turn already.
    """

    def __init__(self, sweep: SweepRecord, leave_out: Collection[int] = ()) -> None:
        self._sweep = sweep
        self._waiting = deque(
            m.number for m in sweep.members() if m.number not in leave_out and not is_settled(sweep, m.number)
        )

    def take(self) -> int | None:
        """The next member that no other process runs. One that outlived a killed sweep is saving, and is waited for."""
        for _ in range(len(self._waiting)):
            number = self._waiting.popleft()
            where = self._sweep.directory(number)
            if not where.is_dir() or run_owner(where) is None:
                return number
            self._waiting.append(number)
        return None

    def pending(self) -> bool:
        """Whether a member has not been started."""
        return bool(self._waiting)

    def ended(self, number: int, code: int) -> None:
        """A member that another process took comes again."""
        if code == TAKEN:
            self._waiting.append(number)


def conduct(source: Source, launcher: Launcher, *, jobs: int, watcher: Watcher, stop: StopFlag) -> None:
    """Start members until none is left; after a signal, ask those that run to stop, and wait for them.

    Args:
        source: which member comes next.
        launcher: starts it.
        jobs: how many run at once.
        watcher: shows it.
        stop: the flag that signals set.
    """
    running: dict[int, Handle] = {}
    try:
        _conduct(source, launcher, running, jobs=jobs, watcher=watcher, stop=stop)
    finally:
        for handle in running.values():  # an error here must not leave members that nobody watches
            handle.stop()


def _conduct(
    source: Source,
    launcher: Launcher,
    running: dict[int, Handle],
    *,
    jobs: int,
    watcher: Watcher,
    stop: StopFlag,
) -> None:
    told = False
    while True:
        ended = {number: code for number, handle in running.items() if (code := handle.poll()) is not None}
        for number, code in ended.items():
            del running[number]
            source.ended(number, code)
            watcher.ended(number, code)
        if stop.signum is None:
            while len(running) < jobs and stop.signum is None and (taken := source.take()) is not None:
                running[taken] = launcher.start(taken)
        elif not told:
            told = True
            for handle in running.values():
                handle.stop()
        if not running and (stop.signum is not None or not source.pending()):
            return
        watcher.show(running)
        if not any(handle.poll() is not None for handle in running.values()):
            time.sleep(_POLL_S)
