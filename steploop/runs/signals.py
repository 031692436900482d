"""Signals as a flag: a handler notes them, and the run looks at the flag where nothing is half done."""

import _thread
import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from steploop.core.interruption import STOPPING, Interrupted, interruption_behind, watched_by

if TYPE_CHECKING:
    import socket

__all__ = [
    "INTERRUPTED",
    "PREEMPTED",
    "StopFlag",
    "catch_signals",
    "exit_code_of",
    "exit_soon_with",
    "heeded",
    "interruption_of",
    "process_flag",
    "signals_as",
]

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL: come again
_SHOW_CURSOR = "\x1b[?25h"


def exit_code_of(signum: int) -> int:
    """130 for Ctrl-C; 75 for a signal with which a scheduler takes a machine away, or a terminal goes."""
    return INTERRUPTED if signum == signal.SIGINT else PREEMPTED


class StopFlag:
    """Whether the run was asked to stop.

    Attributes:
        signum: the first signal that came, or None.
        interruptible: whether a check may raise: while an evaluation runs or data are waited for.
        at_once: whether the handler itself raises: before the first step, when there is nothing to save. What it raises
            in a finalizer, in a callback of C code or under a bare ``except:`` is swallowed there, and raised again.
        second_raises: whether a second Ctrl-C raises KeyboardInterrupt, as a notebook needs it, which would lose all
            its values with the process; else it ends the process.
        ends_at: the Ctrl-C that ends the process at once.
    """

    # no attrs class: whoever imports this module wants to catch signals soon
    def __init__(self, *, at_once: bool = False, second_raises: bool = False) -> None:
        self.signum: int | None = None
        self.interruptible = False
        self.at_once = at_once
        self.second_raises = second_raises
        self.ends_at = 2
        self._raised: weakref.ref[Interrupted] | None = None
        self._pause_s = 0.001

    @property
    def heard(self) -> int | None:
        """The first signal that came to this process; ``signum`` says which one counts for the run."""
        return self.signum

    def agree(self) -> None:
        """Ask between two steps whether the run is to stop: several ranks have to agree (see ``AgreedStop``)."""

    def check_together(self) -> None:
        """The same as ``check``, called by all ranks at once."""
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal has come and this is a moment for it."""
        if self.interruptible and self.signum is not None:
            raise Interrupted(self.signum)

    def handle(self, signum: int, _: FrameType | None = None) -> None:
        """Note a signal; the first one counts."""
        first = self.signum is None
        if first:
            self.signum = signum
        self.raise_at_once(signum, first=first)

    def raise_at_once(self, signum: int, *, first: bool) -> None:
        """Raise in the handler where this is asked for."""
        # while one is on its way up, what is cleaned up must not be interrupted by the next one
        if self.at_once and (self._raised is None or self._raised() is None):
            error = Interrupted(signum if first or self.heard is None else self.heard)
            self._raised = weakref.ref(error, self._raise_again)
            try:
                raise error
            finally:
                del error  # this frame, which its traceback holds, would keep it
        if self.second_raises and not first and signum == signal.SIGINT:
            raise KeyboardInterrupt

    def _raise_again(self, _: object) -> None:
        """Nobody holds what was raised any more: if nobody has heeded it either, send another signal soon."""
        if self.at_once:
            _thread.start_new_thread(self._send_again, ())  # takes no lock that the main thread may hold here

    def _send_again(self) -> None:
        time.sleep(self._pause_s)  # longer each time: whoever swallows them may do so in a loop
        self._pause_s = min(2 * self._pause_s, 1.0)
        installed = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if self.at_once and installed is self:
            # not SIGINT, whatever the first one was: that would count as a second Ctrl-C
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def interruption_allowed(self) -> Iterator[None]:
        """Checks inside may raise Interrupted."""
        self.interruptible = True
        try:
            yield
        finally:
            self.interruptible = False


def _stop_at_second(reader: "socket.socket", ends_at: int) -> None:
    """End the process at the second Ctrl-C, even within a step that takes minutes."""
    seen = 0
    while data := reader.recv(64):
        seen += data.count(signal.SIGINT)
        if seen >= ends_at:
            with suppress(OSError, ValueError, AttributeError):  # the terminal may be gone
                if sys.stdout.isatty():
                    os.write(sys.stdout.fileno(), _SHOW_CURSOR.encode())
            os._exit(INTERRUPTED)


def _listened_to() -> list[signal.Signals]:
    """The signals that stop a run: SIGHUP is none where it was ignored at the start, as under nohup."""
    return [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


_of_the_process: list[StopFlag] = []


def catch_signals() -> None:
    """Catch signals from now on, for a process that is about to load torch: Interrupted is raised at once."""
    flag = StopFlag(at_once=True)
    _of_the_process[:] = [flag]
    atexit.register(_deaf)  # the first to be registered is the last to be called
    for signum in _listened_to():
        signal.signal(signum, flag.handle)
    sys.unraisablehook = _quiet_hook(sys.unraisablehook)


def heeded() -> None:
    """Say that what ``catch_signals`` let a signal raise has arrived where the process is ended: raise no more."""
    for flag in _of_the_process:
        flag.at_once = False


def interruption_of(error: BaseException) -> Interrupted | None:
    """The interruption that an error is, was made of, or may come of: one was raised at once, and swallowed on its way.

    NumPy, for one, is imported by C code of torch that swallows it, and half imported it fails in its own words.
    """
    swallowed = (
        Interrupted(flag.signum) for flag in _of_the_process if flag.at_once and flag.signum is not None
    )
    return interruption_behind(error) or next(swallowed, None)


def _quiet_hook(shown: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook for errors that Python cannot raise: it prints none for a signal, which is raised again elsewhere."""

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            shown(unraisable)

    return hook


def _deaf() -> None:
    """Python's shutdown puts each handler of ours back to the system's, which would end the process by the signal."""
    for signum in _listened_to():
        signal.signal(signum, signal.SIG_IGN)


def process_flag() -> StopFlag:
    """The flag that signals set since ``catch_signals``, with what has come already; a new one without that."""
    return _of_the_process[0] if _of_the_process else StopFlag()


def exit_soon_with(code: int) -> None:
    """Let a signal that comes while Python shuts down end the process with ``code``, which is decided by now."""
    heeded()
    for signum in _listened_to():
        signal.signal(signum, lambda *_: os._exit(code))


@contextmanager
def signals_as(flag: StopFlag) -> Iterator[None]:
    """Inside, signals set ``flag``, and a second Ctrl-C ends the process at once.

    Python allows handlers in the main thread only; in any other one, this only lets ``flag`` be checked.
    """
    with watched_by(flag.check, flag.check_together):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with nullcontext() if flag.second_raises else _second_ends(flag.ends_at):
            before: dict[int, Any] = {s: signal.signal(s, flag.handle) for s in _listened_to()}
            hook, sys.unraisablehook = sys.unraisablehook, _quiet_hook(sys.unraisablehook)
            try:
                yield
            finally:
                sys.unraisablehook = hook
                for signum, handler in before.items():
                    signal.signal(signum, handler)


@contextmanager
def _second_ends(ends_at: int) -> Iterator[None]:
    """Inside, a second Ctrl-C ends the process."""
    import socket

    reader, writer = socket.socketpair()
    writer.setblocking(False)  # noqa: FBT003  (its only parameter)
    # the kernel's signal is written here at once, also while the main thread is inside a long call of torch
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(
        target=_stop_at_second, args=(reader, ends_at), daemon=True, name="second Ctrl-C"
    )
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd)
        writer.close()  # the thread reads the end and returns
        thread.join()
        reader.close()
