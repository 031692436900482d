"""A logger that writes a CSV table: a row for each log point and evaluation."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steploop.core.atomic_files import replace_file

__all__ = ["CsvTable"]


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class CsvTable:
    """Rows of ``step`` and the numbers logged at once; what was not among them is left empty.

    A name that was not there before gets a column: the table is then written anew, which happens once or twice in
    a run.

    Args:
        path: the file; an existing one is continued.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = self._read()[0] if path.exists() else ["step"]

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        new = [name for name in values if name not in self._names]
        if new or not self._path.exists():
            self._names += new
            self._write(self._read()[1] if self._path.exists() else [])
        with open(self._path, "a", newline="", encoding="utf-8", opener=_without_links) as file:
            csv.DictWriter(file, self._names).writerow({"step": step, **values})

    def rewrite(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Put these rows in the place of all that are there: at a resume, those of steps that stand."""
        self._names = list(dict.fromkeys(["step", *(name for _, values in rows for name in values)]))
        self._write([{"step": step, **values} for step, values in rows])

    def close(self) -> None:
        """Nothing is held back."""

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ["step"]), list(reader)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the table anew."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._names)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self._path, text.getvalue().encode())
