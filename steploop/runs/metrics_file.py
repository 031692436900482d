"""Reads the lines of ``metrics.jsonl``, within limits."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from steploop.errors import DataError
from steploop.runs.directory_reader import MAX_DEPTH, nested_deeper, open_file
from steploop.runs.record_values import Line, checked_line

__all__ = ["read_lines"]

NAME: Final = "metrics.jsonl"
# A run that logs every 50 steps needs 50 million steps for so many lines.
MAX_LINES: Final = 1_000_000
MAX_BYTES: Final = 256 << 20
MAX_LINE: Final = 1 << 20  # bytes
MAX_NAMES: Final = 5_000  # different names of numbers: each of them is a curve


def read_lines(directory: Path, problems: list[str]) -> Iterator[Line | None]:
    """The lines of a run, None for one that is damaged; nothing if there is no file.

    Args:
        directory: the run's.
        problems: receives a sentence for each limit that was met.

    Raises:
        DataError: the file is a link, a pipe, a device or a directory, or cannot be read.
    """
    names: dict[str, None] = {}
    try:
        with open_file(directory, NAME) as fd, os.fdopen(fd, "rb", closefd=False) as file:
            for text in _texts(file, problems):
                line = _line(text)
                yield None if line is None else _bounded(line, names)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{directory / NAME} cannot be read: {error.strerror}.") from error
    if len(names) > MAX_NAMES:
        problems.append(f"{NAME} has more than {MAX_NAMES:,} different names; the first of them are shown.")


def _texts(file: BinaryIO, problems: list[str]) -> Iterator[bytes]:
    """The lines as they stand, blank ones left out; an empty text for one that is too long."""
    read = 0
    for _ in range(MAX_LINES):
        text = file.readline(MAX_LINE + 1)
        read += len(text)
        if len(text) > MAX_LINE:
            while text and not text.endswith(b"\n") and read < MAX_BYTES:
                text = file.readline(MAX_LINE)
                read += len(text)
            yield b""
        elif not text:
            return
        elif text.strip():
            yield text
        if read >= MAX_BYTES:
            break
    if file.read(1):
        problems.append(
            f"{NAME} is longer than {MAX_LINES:,} lines or {MAX_BYTES >> 20} MiB; its beginning is shown."
        )


def _line(text: bytes) -> Line | None:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or nested_deeper(value, MAX_DEPTH):
        return None
    return checked_line(value)


def _bounded(line: Line, names: dict[str, None]) -> Line:
    """The line, without numbers whose names are more than are shown."""
    inner = line.get("metrics") if line["kind"] == "eval" else line
    if inner is None or inner.keys() <= names.keys():
        return line
    for name in inner:
        if len(names) <= MAX_NAMES:
            names[name] = None
    if len(names) <= MAX_NAMES:
        return line
    kept = {name: value for name, value in inner.items() if name in names}
    return kept if inner is line else {**line, "metrics": kept}
