"""Start members of a sweep: each in a process of its own, or one after the other in this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from steploop.runs.directory import not_written

__all__ = [
    "Handle",
    "Inside",
    "Launcher",
    "Processes",
    "Started",
    "member_command",
    "member_environment",
    "open_log",
]


class Handle(Protocol):
    """A member that was started."""

    def poll(self) -> int | None:
        """Its exit code once it has ended; None before."""

    def stop(self) -> None:
        """Ask it to stop after the step in hand."""


class Launcher(Protocol):
    """Starts members."""

    def start(self, number: int) -> Handle:
        """Start the member of that number."""


def member_command(path: Path, number: int, *, trust: bool) -> list[str]:
    """The command of a member's process."""
    words = [sys.executable, "-m", "steploop.tools.sweep.member_process", str(path.absolute()), str(number)]
    return [*words, *(["--trust"] if trust else [])]


def member_environment(threads: int) -> dict[str, str]:
    """The environment of a member's process: it computes with so many threads, which decide about bits."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def open_log(path: Path, number: int) -> int:
    """A descriptor that appends to the log of a member, which is no link.

    Raises:
        CheckpointWriteError: it cannot be opened.
    """
    log = path / "logs" / f"{number:03d}.log"
    try:
        log.parent.mkdir(exist_ok=True)
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise not_written(log, error) from error


class Started:
    """A member in a process of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def poll(self) -> int | None:
        """Its exit code; of one that a signal ended, minus its number."""
        code = self._process.poll()
        if code is not None and self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def stop(self) -> None:
        """Send SIGTERM: it saves and ends."""
        self._process.send_signal(signal.SIGTERM)


class Processes:
    """Starts each member as a process.

    Args:
        path: the sweep's directory.
        threads: of each member.
        trust: run a recipe whose files belong to another user.
    """

    def __init__(self, path: Path, *, threads: int, trust: bool) -> None:
        self._path = path
        self._threads = threads
        self._trust = trust

    def start(self, number: int) -> Started:
        """Start a member. Its stdin stays open as long as this process lives, and the member ends with it."""
        log = open_log(self._path, number)
        try:
            # a group of its own: Ctrl-C in the terminal is for the sweep, which passes it on once
            process = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
                member_command(self._path, number, trust=self._trust),
                stdin=subprocess.PIPE, stdout=log, stderr=log, env=member_environment(self._threads), process_group=0,
            )  # fmt: skip
        finally:
            os.close(log)
        return Started(process)


class _Ended:
    """A member that has ended already."""

    def __init__(self, code: int) -> None:
        self._code = code

    def poll(self) -> int:
        """Its exit code."""
        return self._code

    def stop(self) -> None:
        """Nothing is left to stop."""


class Inside:
    """Runs members in this process: those of a recipe that is in no file.

    Args:
        run: runs the member of a number and returns its exit code.
    """

    def __init__(self, run: Callable[[int], int]) -> None:
        self._run = run

    def start(self, number: int) -> _Ended:
        """Run a member to its end."""
        return _Ended(self._run(number))
