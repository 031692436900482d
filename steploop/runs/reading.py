"""Reads run directories: what a run recorded about itself, as one frozen value.

Nothing here imports torch or runs anything: a report can be made of a run that is still going on, that died, whose
recipe is gone, or that a stranger made.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import attrs

from steploop.errors import ConfigError, DataError
from steploop.runs.directory_reader import read_file
from steploop.runs.journal_lines import Journal, attempted_of, from_one
from steploop.runs.metrics_file import read_lines
from steploop.runs.record_values import Line, Status, is_number
from steploop.runs.standing import is_run, read_standing

__all__ = ["Curve", "Line", "RunRecord", "find_runs", "is_run", "read_run"]

SOURCE_LIMIT = 1 << 20  # bytes of recipe.py
_MOST_PICTURES = 50


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
    """What a run directory says. All names and texts in it are safe to print, except the values of Config fields.

    Attributes:
        path: the directory.
        state: running, finished, interrupted, failed; "died" for a run whose process is gone and whose status does not
            say how it ended; "unknown" for a status that says something else.
        config: ``config.json``; empty if there is none that can be read.
        status: ``status.json``.
        train: the lines of training, in the order of the attempted steps.
        evals: the lines of evaluations, in the same order.
        events: all other lines, in the order of the file.
        source: the text of ``recipe.py``, or None.
        pictures: PNG files that the recipe left in the directory.
        damaged_lines: lines of ``metrics.jsonl`` that could not be read (the last one of a run that was killed).
        problems: a sentence for each file or value that could not be read.
    """

    path: Path
    state: str = "unknown"
    config: Line = attrs.field(factory=dict)
    status: Status = attrs.field(factory=Status)
    train: tuple[Line, ...] = ()
    evals: tuple[Line, ...] = ()
    events: tuple[Line, ...] = ()
    source: str | None = None
    pictures: tuple[Path, ...] = ()
    damaged_lines: int = 0
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.path.resolve().name

    @property
    def recipe(self) -> str:
        """The name of the recipe, or "?"."""
        recipe = self.config.get("recipe")
        return str((recipe.get("name") if isinstance(recipe, dict) else recipe) or "?")

    @property
    def fields(self) -> Line:
        """The fields of the recipe's Config."""
        fields: Line = self.config.get("config", {})
        return fields

    @property
    def attempted(self) -> int:
        """Attempted steps, by the last line."""
        return max((attempted_of(line) for line in (*self.train, *self.evals)), default=0)

    @property
    def steps(self) -> int:
        """Applied steps, by the last line; or by the status, if the run ended between two lines."""
        logged = (int(line.get("step", 0)) for line in (*self.train, *self.evals))
        return max(self.status.step or 0, *logged, 0)

    @property
    def skipped(self) -> int:
        """Steps that were not finite and therefore not taken."""
        counted = sum(1 for event in self.events if event.get("event") == "skipped")
        return max(counted, *(int(line.get("skipped", 0)) for line in self.train), 0)

    @property
    def time_s(self) -> float:
        """Seconds of training and evaluation; the parts of a resumed run added up."""
        total = last = 0.0
        for line in sorted((*self.train, *self.evals), key=attempted_of):
            now = float(line.get("time_s", 0.0))
            total += now - last if now >= last else now  # a resume may start its clock anew
            last = now
        return total

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the evaluated metrics, in the order in which they first appear."""
        return tuple(self._eval_curves)

    def train_keys(self) -> tuple[str, ...]:
        """Names of all numbers in the lines of training."""
        return tuple(self._train_curves)

    def train_curve(self, key: str) -> Curve:
        """A number of the training lines over the attempted steps."""
        return self._train_curves.get(key, Curve())

    def eval_curve(self, metric: str) -> Curve:
        """A metric of the evaluations over the attempted steps."""
        return self._eval_curves.get(metric, Curve())

    @cached_property
    def _train_curves(self) -> dict[str, Curve]:
        return _curves((attempted_of(line), line) for line in self.train)

    @cached_property
    def _eval_curves(self) -> dict[str, Curve]:
        return _curves((attempted_of(line), line.get("metrics", {})) for line in self.evals)

    def skipped_steps(self) -> tuple[int, ...]:
        """Attempted steps that were not taken; if no event names them, the first line that counts them."""
        named = {attempted_of(event) for event in self.events if event.get("event") == "skipped"}
        if named:
            return tuple(sorted(named))
        found, before = [], 0
        for line in self.train:
            now = line.get("skipped", 0)
            if now > before:
                found.append(attempted_of(line))
            before = now
        return tuple(found)

    def best(self) -> Line | None:
        """The evaluation that was the best, or None if no metric was monitored."""
        logged = next((line for line in reversed(self.evals) if line.get("best")), None)
        said = self.status.best
        # the log may lack the line of the best; a status that is written at the end knows better
        if (
            said is None
            or self.state == "running"
            or said["step"] in {line.get("step") for line in self.evals}
        ):
            return logged
        return said if logged is None or logged.get("step", 0) < said["step"] else logged


# what says where a line stands, and is no curve
_PLACE = frozenset(
    {"kind", "phase", "step", "attempted", "epoch", "batch", "time_s", "skipped", "nonfinite", "best"}
)


def _curves(lines: Iterator[tuple[int, Line]]) -> dict[str, Curve]:
    """Name -> its values over the steps, for all numbers in lines; None where a number was not finite."""
    points: dict[str, tuple[list[int], list[float | None]]] = {}
    for step, line in lines:
        for name, value in line.items():
            if name not in _PLACE:
                steps, values = points.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value) if is_number(value) else None)
    return {name: Curve(tuple(steps), tuple(values)) for name, (steps, values) in points.items()}


def find_runs(root: Path) -> list[Path]:
    """Run directories at or below ``root``, sorted. Links are not followed, and runs inside of a run are not looked for.

    Raises:
        ConfigError: ``root`` is no directory.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a directory. Give one that holds run directories, such as runs/.")
    found, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        if is_run(folder):
            found.append(folder)
            continue
        try:
            with os.scandir(folder) as entries:
                waiting += [folder / e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:  # a folder that may not be listed, or whose path is too long
            continue
    return sorted(found)


def read_run(path: Path | str) -> RunRecord:
    """Read a run directory, as far as it goes; what could not be read is listed in ``problems``.

    Where lines of the same steps stand twice, the later ones count. The steps of a second phase, which are counted
    from 0 again, are put behind those of the first.

    Raises:
        ConfigError: there is no run at ``path``.

    Example:
        >>> recipe = Recipe(state=state, train_step=train_step, batches=loader, epochs=1)
        >>> summary = steploop.run(recipe, out=folder / "run", progress="none")
        >>> read_run(folder / "run").state
        'finished'
    """
    path = Path(path)
    if not is_run(path):
        raise ConfigError(
            f"{path} is not a run directory: expected config.json or metrics.jsonl in it. `steploop runs DIR` lists those below DIR."
        )
    standing = read_standing(path)
    problems = list(standing.problems)
    journal, damaged = Journal(), 0
    try:
        for line in read_lines(path, problems):
            if line is None:
                damaged += 1
            else:
                journal.add(from_one(line, standing.config))
    except DataError as error:
        problems.append(str(error))
    source = None
    try:
        source = read_file(path, "recipe.py", limit=SOURCE_LIMIT)
    except DataError as error:
        problems.append(str(error))
    return RunRecord(
        path=path,
        state=standing.state,
        config=standing.config,
        status=standing.status,
        train=tuple(journal.train),
        evals=tuple(journal.evals),
        events=tuple(journal.events),
        source=None if source is None else source.decode("utf-8", "replace"),
        pictures=_pictures(path),
        damaged_lines=damaged,
        problems=tuple(problems),
    )


def _pictures(path: Path) -> tuple[Path, ...]:
    """The PNG files in a directory, links left out."""
    try:
        with os.scandir(path) as entries:
            names = [e.name for e in entries if e.name.endswith(".png") and e.is_file(follow_symlinks=False)]
    except OSError:
        return ()
    return tuple(path / name for name in sorted(names)[:_MOST_PICTURES])
