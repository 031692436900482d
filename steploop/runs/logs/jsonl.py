"""A file of JSON objects, one a line: strict JSON, whole lines, in UTF-8 under any locale."""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steploop.core.atomic_files import replace_file
from steploop.errors import CheckpointWriteError
from steploop.runs.text_names import readable

__all__ = ["JsonLines", "encode", "read_json_lines"]

_MOST_HELD_BYTES = 64 << 20  # a line has some 300 bytes: a log point a second for two days


def _finite(value: Any, name: str, nonfinite: list[str]) -> Any:
    """The value with None for each number that JSON cannot hold; their names are collected."""
    if isinstance(value, Mapping):
        return {
            key: _finite(part, f"{name}.{key}" if name else str(key), nonfinite)
            for key, part in value.items()
        }
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


def encode(line: Mapping[str, Any]) -> bytes:
    """One object as a line: numbers that are not finite become null, and "nonfinite" lists their names."""
    nonfinite: list[str] = []
    plain = _finite(line, "", nonfinite)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return readable(json.dumps(plain, allow_nan=False, ensure_ascii=False)).encode() + b"\n"


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a file; leave out a line that a kill cut off or a power loss damaged."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
            if b"\\u" in line:  # half a surrogate pair could not be written again: UnicodeEncodeError
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found


class JsonLines:
    """Appends objects to a file, each by a single write where the system takes it whole.

    What cannot be written, because the disk is full for instance, is held in memory and written before the next line.

    Args:
        path: the file; an existing one is continued.
        report: called with a sentence when lines begin to be held back, and when they are written again.
        most_held_bytes: beyond so many, the oldest lines that are held back are lost.

    Raises:
        CheckpointWriteError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        report: Callable[[str], None] = lambda _: None,
        *,
        most_held_bytes: int = _MOST_HELD_BYTES,
    ) -> None:
        self._path = path
        self._report = report
        self._most_held_bytes = most_held_bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._begun = False  # whether a part of the first one is in the file already
        self._lost = 0
        self._reason = ""
        try:
            # no link is followed, and no pipe waited for: a directory may be a gift
            safely = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | safely, 0o666)
            if _ends_within_a_line(path):
                self._hold(b"\n")
        except OSError as error:
            raise _not_written(path, error) from error

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        self._hold(encode(line))
        self.flush()

    def flush(self) -> None:
        """Write what is held back, as far as the system takes it."""
        while self._held:
            data = self._held[0]
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                self._failed(error)
                return
            self._held_bytes -= written
            self._begun = written < len(data)
            if self._begun:
                self._held[0] = data[written:]
            else:
                self._held.popleft()
        if self._reason:
            self._reason = ""
            lost = f"{self._lost} lines were lost" if self._lost else "no line was lost"
            self._report(f"{self._path} is written again; {lost}.")

    @property
    def missing(self) -> dict[str, Any] | None:
        """How many lines the file lacks, and why; None if it lacks none."""
        lines = self._lost + len(self._held)
        return (
            {"lines": lines, "reason": self._reason or "it could not be written for a time"}
            if lines
            else None
        )

    def keep(
        self,
        wanted: Callable[[Mapping[str, Any]], bool],
        change: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda line: line,
    ) -> list[Mapping[str, Any]]:
        """Drop the lines that are not wanted, and one that was cut off, all at once.

        Args:
            wanted: which lines stay.
            change: what becomes of each of them.

        Returns:
            The lines that are in the file now.
        """
        kept = [change(line) for line in read_json_lines(self._path) if wanted(line)]
        data = b"".join(map(encode, kept))
        if data != self._path.read_bytes():
            try:
                replace_file(self._path, data)
            except OSError as error:
                raise _not_written(self._path, error) from error
            os.close(self._fd)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._held.clear()
            self._held_bytes, self._begun = 0, False
        return kept

    def close(self) -> None:
        """Write what is held back, and give the file back."""
        self.flush()
        os.close(self._fd)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)

    def _failed(self, error: OSError) -> None:
        """Note that lines are held back; lose the oldest of them if they are too many."""
        while self._held_bytes > self._most_held_bytes and len(self._held) > 1 + self._begun:
            self._held_bytes -= len(self._held[self._begun])
            del self._held[self._begun]
            self._lost += 1
        if not self._reason:
            self._report(
                f"{self._path} cannot be written: {error.strerror}. Its lines are kept in memory and written later."
            )
        self._reason = str(error.strerror)


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _not_written(path: Path, error: OSError) -> CheckpointWriteError:
    raised = CheckpointWriteError(
        f"{path} cannot be written: {error.strerror}. Free some space or choose another --out."
    )
    raised.errno = error.errno
    return raised
