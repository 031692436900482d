"""Signals as a flag: Ctrl-C, SIGTERM and SIGUSR1 are noted, and looked at where nothing is half done."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import attrs

from steploop.core.interruption import Interrupted, watched_by

__all__ = ["INTERRUPTED", "PREEMPTED", "StopFlag", "exit_code_of", "signals_as"]

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL: come again
_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHOW_CURSOR = "\x1b[?25h"


def exit_code_of(signum: int) -> int:
    """130 for Ctrl-C, 75 for the signals with which a scheduler takes a machine away."""
    return INTERRUPTED if signum == signal.SIGINT else PREEMPTED


@attrs.define
class StopFlag:
    """Whether the run was told to stop.

    Attributes:
        signum: the first signal that came, or None.
        interruptible: whether a check may raise: while an evaluation runs or data are waited for.
        at_once: whether the handler itself raises: before the first step, when there is nothing to save.
    """

    signum: int | None = None
    interruptible: bool = False
    at_once: bool = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come and this is a moment for it."""
        if self.interruptible and self.signum is not None:
            raise Interrupted(self.signum)

    def handle(self, signum: int, _: FrameType | None = None) -> None:
        """What a signal does: it sets the flag; the first one counts."""
        if self.signum is None:
            self.signum = signum
        if self.at_once:
            raise Interrupted(signum)

    @contextmanager
    def interruption_allowed(self) -> Iterator[None]:
        """Checks inside may raise Interrupted."""
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False


def _stop_at_second(reader: socket.socket) -> None:
    """End the process at the second Ctrl-C, whatever the main thread is doing: a step may take minutes."""
    seen = 0
    while data := reader.recv(64):
        seen += data.count(signal.SIGINT)
        if seen > 1:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR.encode())
            os._exit(INTERRUPTED)


@contextmanager
def signals_as(flag: StopFlag) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGUSR1 set ``flag``, and a second Ctrl-C ends the process at once.

    Python allows handlers in the main thread only; in any other one, this only lets ``flag`` be checked.
    """
    with watched_by(flag.check):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = socket.socketpair()
        writer.setblocking(False)  # noqa: FBT003  (its only parameter)
        # the kernel's signal is written here at once, also while the main thread is inside a long call of torch
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=_stop_at_second, args=(reader,), daemon=True, name="second Ctrl-C")
        thread.start()
        before: dict[int, Any] = {s: signal.signal(s, flag.handle) for s in _WATCHED}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            signal.set_wakeup_fd(old_fd)
            writer.close()  # the thread reads the end and returns
            thread.join()
            reader.close()
