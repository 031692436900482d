"""Standard output and error that may fail: a reader that went away, a full disk, a closed terminal.

A run outlives them: what cannot be shown is dropped, and said once on the other stream. A command whose output is
its result ends instead, with one sentence and without a traceback.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["lasting_streams", "open_missing_streams", "settle_streams", "watched_streams"]

_NAMES = ("stdout", "stderr")
_CANNOT_WRITE = 4  # the exit code of CheckpointWriteError


class _Output:
    """A text stream whose failures are dealt with here.

    Args:
        stream: what is written to; None where Python found its descriptor closed.
        name: stdout or stderr.
        lasting: whether to go on without it.
    """

    def __init__(self, stream: Any, name: str, *, lasting: bool) -> None:
        self._stream = stream
        self._name = name
        self.lasting = lasting
        self._reported = False

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        if self._stream is not None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._failed(error)

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def _failed(self, error: OSError | ValueError) -> None:
        reason = getattr(error, "strerror", None) or str(error)
        if not self.lasting:
            self.lasting = self._reported = True  # what else is said on the way out
            if self._name == "stdout" and getattr(error, "errno", None) != errno.EPIPE:
                sys.stderr.write(f"steploop: stdout cannot be written: {reason}.\n")
            raise SystemExit(_CANNOT_WRITE if getattr(error, "errno", None) != errno.EPIPE else 1) from error
        if self._name == "stdout" and not self._reported:
            self._reported = True
            sys.stderr.write(f"steploop: stdout cannot be written: {reason}. The run goes on without it.\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def watched_streams(*, lasting: bool = False) -> Iterator[None]:
    """Inside, a standard stream that fails ends the process in good order; or, if ``lasting``, is left out.

    Inside of another one, it only makes that one lasting.
    """
    open_missing_streams()
    installed: dict[str, tuple[Any, _Output]] = {}
    for name in _NAMES:
        stream = getattr(sys, name)
        if isinstance(stream, _Output):
            stream.lasting = stream.lasting or lasting
        else:
            installed[name] = stream, _Output(stream, name, lasting=lasting)
            setattr(sys, name, installed[name][1])
    try:
        yield
    finally:
        for name, (stream, output) in installed.items():
            output.flush()
            if getattr(sys, name) is output:
                setattr(sys, name, stream)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, whoever prints may lose stdout and stderr without noticing."""
    with watched_streams(lasting=True):
        yield


def open_missing_streams() -> None:
    """Open the null device for each of descriptors 0 to 2 that is closed.

    The next file that is opened would take its number, and what C code prints would go into that file.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def settle_streams() -> None:
    """Give what a failed stream still holds to the null device, so that Python's last flush does not fail."""
    for name in _NAMES:
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
