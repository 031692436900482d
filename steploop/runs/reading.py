"""Reads run directories: what a run recorded about itself, as one frozen value.

Nothing here imports torch or runs anything: a report can be made of a run that is still going on, that died, or
whose recipe is gone.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from steploop.errors import ConfigError, DataError
from steploop.runs.journal_lines import Journal, Line, attempted_of, is_number

__all__ = ["Curve", "Line", "RunRecord", "find_runs", "is_run", "read_run"]


@attrs.frozen
class Curve:
    """One quantity over the attempted steps of a run.

    Attributes:
        steps: attempted steps, rising.
        values: one for each; None where it was not finite.
    """

    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)


@attrs.frozen(kw_only=True, eq=False)
class RunRecord:
    """What a run directory says.

    Attributes:
        path: the directory.
        config: ``config.json``; empty where there is none.
        status: ``status.json``; empty where there is none.
        train: the lines of training, in the order of the attempted steps.
        evals: the lines of evaluations, likewise.
        events: everything else that was noted, in the order of the file.
        source: the text of ``recipe.py``, or None.
        pictures: PNG files that the recipe left in the directory.
        damaged_lines: lines of ``metrics.jsonl`` that could not be read (the last one of a run that was killed).
    """

    path: Path
    config: Line = attrs.field(factory=dict)
    status: Line = attrs.field(factory=dict)
    train: tuple[Line, ...] = ()
    evals: tuple[Line, ...] = ()
    events: tuple[Line, ...] = ()
    source: str | None = None
    pictures: tuple[Path, ...] = ()
    damaged_lines: int = 0

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def recipe(self) -> str:
        """The name of the recipe, or "?"."""
        recipe = self.config.get("recipe")
        return str(recipe.get("name", "?")) if isinstance(recipe, Mapping) else str(recipe or "?")

    @property
    def fields(self) -> Line:
        """The fields of the recipe's Config."""
        fields = self.config.get("config")
        return fields if isinstance(fields, Mapping) else {}

    @property
    def state(self) -> str:
        """running, finished, interrupted, failed; "died" for one that says running and whose process is gone."""
        state = str(self.status.get("state", "unknown"))
        pid = self.status.get("pid")
        if state == "running" and self.status.get("host") == socket.gethostname() and isinstance(pid, int):
            return state if _alive(pid) else "died"
        return state

    @property
    def attempted(self) -> int:
        """Attempted steps, by the last line."""
        return max((attempted_of(line) for line in (*self.train, *self.evals)), default=0)

    @property
    def steps(self) -> int:
        """Applied steps, by the last line; or by the status, where the run ended between two lines."""
        ended = self.status.get("step")
        logged = (int(line.get("step") or 0) for line in (*self.train, *self.evals))
        return max(ended if isinstance(ended, int) else 0, *logged, 0)

    @property
    def skipped(self) -> int:
        """Steps that were not finite and therefore not taken."""
        counted = sum(1 for event in self.events if event.get("event") == "skipped")
        return max(counted, *(int(line.get("skipped") or 0) for line in self.train), 0)

    @property
    def time_s(self) -> float:
        """Seconds of training and evaluation; the parts of a resumed run added up."""
        total = last = 0.0
        for line in sorted((*self.train, *self.evals), key=attempted_of):
            now = float(line.get("time_s") or 0.0)
            total += now - last if now >= last else now  # a resume may start its clock anew
            last = now
        return total

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the evaluated metrics, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for line in self.evals for name in line.get("metrics") or {}))

    def train_keys(self) -> tuple[str, ...]:
        """Names of all numbers in the lines of training."""
        keys = dict.fromkeys(k for line in self.train for k, v in line.items() if is_number(v) or v is None)
        for line in self.train:
            keys.update(dict.fromkeys(line.get("nonfinite") or ()))
        return tuple(k for k in keys if k not in _COUNTERS)

    def train_curve(self, key: str) -> Curve:
        """A number of the training lines over the attempted steps."""
        return _curve((attempted_of(line), line.get(key)) for line in self.train if key in line)

    def eval_curve(self, metric: str) -> Curve:
        """A metric of the evaluations over the attempted steps."""
        pairs = ((attempted_of(line), line.get("metrics") or {}) for line in self.evals)
        return _curve((step, metrics[metric]) for step, metrics in pairs if metric in metrics)

    def skipped_steps(self) -> tuple[int, ...]:
        """Attempted steps that were not taken; where no event tells, the first line that counts them."""
        told = tuple(attempted_of(e) for e in self.events if e.get("event") == "skipped")
        if told:
            return tuple(sorted(set(told)))
        found, before = [], 0
        for line in self.train:
            now = int(line.get("skipped") or 0)
            if now > before:
                found.append(attempted_of(line))
            before = now
        return tuple(found)

    def best(self) -> Line | None:
        """The evaluation that was the best, or None where no metric was monitored."""
        return next((line for line in reversed(self.evals) if line.get("best")), None)


_COUNTERS = frozenset({"step", "attempted", "epoch", "batch", "time_s", "skipped"})


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _curve(pairs: Iterator[tuple[int, Any]]) -> Curve:
    points = [(step, float(value) if is_number(value) else None) for step, value in pairs]
    return Curve(tuple(p[0] for p in points), tuple(p[1] for p in points))


def is_run(path: Path) -> bool:
    """Whether a directory looks like that of a run."""
    return (path / "config.json").is_file() or (path / "metrics.jsonl").is_file()


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below ``root``, sorted; nothing is looked for inside of a run.

    Raises:
        ConfigError: ``root`` is no directory.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory. Give one that holds run directories, such as runs/.")
    found: list[Path] = []
    for folder, inner, _ in os.walk(root):
        inner.sort()
        if is_run(Path(folder)):
            found.append(Path(folder))
            inner.clear()
    return sorted(found)


def read_run(path: Path) -> RunRecord:
    """Read a run directory, as far as it goes.

    Where lines of the same steps stand twice, the later ones count. The steps of a second phase, which are counted
    from 0 again, are put behind those of the first.

    Raises:
        ConfigError: there is no run at ``path``.
        DataError: ``config.json`` or ``status.json`` is not JSON.
    """
    if not path.is_dir() or not is_run(path):
        raise ConfigError(
            f"{path} is not a run directory: expected config.json or metrics.jsonl in it. `steploop runs DIR` lists those below DIR."
        )
    lines = list(_lines(path / "metrics.jsonl"))
    journal = Journal()
    for line in lines:
        if line is not None:
            journal.add(line)
    recipe = path / "recipe.py"
    return RunRecord(
        path=path,
        config=_json(path / "config.json"),
        status=_json(path / "status.json"),
        train=tuple(journal.train),
        evals=tuple(journal.evals),
        events=tuple(journal.events),
        source=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
        pictures=tuple(sorted(path.glob("*.png"))),
        damaged_lines=lines.count(None),
    )


def _lines(path: Path) -> Iterator[Line | None]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except ValueError:
                yield None
                continue
            yield value if isinstance(value, dict) else None


def _json(path: Path) -> Line:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}). It was damaged or edited: mend it, or remove it to read the rest of the run."
        ) from error
    return value if isinstance(value, dict) else {}
