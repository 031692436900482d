"""A file of JSON objects, one a line: strict JSON, whole lines, in UTF-8 whatever the locale says."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steploop.errors import CheckpointWriteError
from steploop.runs.atomic_files import replace_file
from steploop.runs.text_names import readable

__all__ = ["JsonLines", "encode", "read_json_lines"]


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
    """The objects of a file; a line that was cut off by a kill, or that a power loss made something else of, is left out."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


class JsonLines:
    """Appends objects to a file, each by a single write, so that a reader sees whole lines.

    Raises:
        CheckpointWriteError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _not_written(path, error) from error

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Append one object."""
        try:
            os.write(self._fd, encode(line))
        except OSError as error:
            raise _not_written(self._path, error) from error

    def keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
        """Drop the lines that are not wanted, and one that was cut off, all at once; those that stay."""
        kept = [line for line in read_json_lines(self._path) if wanted(line)]
        data = b"".join(map(encode, kept))
        if data != self._path.read_bytes():
            try:
                replace_file(self._path, data)
            except OSError as error:
                raise _not_written(self._path, error) from error
            os.close(self._fd)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        return kept

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


def _not_written(path: Path, error: OSError) -> CheckpointWriteError:
    raised = CheckpointWriteError(
        f"{path} cannot be written: {error.strerror}. Free some space or choose another --out."
    )
    raised.errno = error.errno
    return raised
