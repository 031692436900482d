"""The result of a sweep: a row for each combination of settings, with mean and spread over its seeds, best first."""

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from steploop.core.html_tables import html_table
from steploop.tools.report.charts import number
from steploop.tools.report.results import duration
from steploop.tools.report.run_labels import short
from steploop.tools.sweep.member_results import MemberResult, read_members
from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["SweepResult", "SweepRow", "read_result"]


@attrs.frozen(kw_only=True)
class SweepRow:
    """One combination of settings.

    Attributes:
        settings: the settings that vary, without the seed where each combination has several.
        members: its runs, one for each seed.
        values: the results of those that finished.
    """

    settings: Mapping[str, Any]
    members: tuple[MemberResult, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean of the values; None where no run finished."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The standard deviation of the values (with n - 1); None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def seconds(self) -> float:
        """The mean time of a run."""
        return statistics.fmean(member.seconds for member in self.members)

    @property
    def states(self) -> str:
        """How its runs stand: ``finished``, or ``3 finished, 1 failed``."""
        counts = dict.fromkeys(("finished", *(m.state for m in self.members)), 0)
        for member in self.members:
            counts[member.state] += 1
        found = {state: count for state, count in counts.items() if count}
        return (
            next(iter(found)) if len(found) == 1 else ", ".join(f"{n} {state}" for state, n in found.items())
        )


@attrs.frozen(kw_only=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        path: its directory.
        recipe: the name of the recipe.
        metric: what the rows are ordered by; None before the first evaluation.
        mode: "min" or "max"; None where the recipe monitors nothing, and rows are in the order of the grid.
        rows: best first.
        search: "grid" or "optuna".
        planned: how many runs the sweep has, or will have.
        interrupted: the signal that stopped it, or None.
    """

    path: str
    recipe: str
    metric: str | None
    mode: str | None
    rows: tuple[SweepRow, ...]
    search: str
    planned: int
    interrupted: int | None = None

    @property
    def members(self) -> tuple[MemberResult, ...]:
        """Every run, by its number."""
        return tuple(sorted((m for row in self.rows for m in row.members), key=lambda member: member.number))

    @property
    def best(self) -> SweepRow | None:
        """The best row; None where nothing finished, or nothing is monitored."""
        first = self.rows[0] if self.rows else None
        return first if self.mode is not None and first is not None and first.values else None

    @property
    def failed(self) -> tuple[MemberResult, ...]:
        """The runs that failed, died, or cannot be read."""
        return tuple(member for member in self.members if member.state in {"failed", "died", "unknown"})

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "sweep": self.path,
            "recipe": self.recipe,
            "metric": self.metric,
            "mode": self.mode,
            "planned": self.planned,
            "finished": sum(member.state == "finished" for member in self.members),
            "rows": [
                {
                    "settings": dict(row.settings), "mean": row.mean, "spread": row.spread, "values": list(row.values),
                    "seconds": round(row.seconds, 3), "states": row.states,
                    "members": [attrs.asdict(member) for member in row.members],
                }
                for row in self.rows
            ],
        }  # fmt: skip

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The heads and the rows of the table, as texts that are safe to print."""
        names = list(self.rows[0].settings) if self.rows else []
        seeds = max((len(row.members) for row in self.rows), default=0) > 1
        heads = [*names, self.metric or "metric", *(["spread", "seeds"] if seeds else []), "time", "state"]
        body = []
        for row in self.rows:
            over = [_shown(row.spread), f"{len(row.values)}/{len(row.members)}"] if seeds else []
            cells = [short(row.settings[name]) for name in names]
            body.append([*cells, _shown(row.mean), *over, duration(row.seconds), row.states])
        return heads, body

    def __str__(self) -> str:
        heads, body = self.cells()
        widths = [max(len(line[n]) for line in [heads, *body]) for n in range(len(heads))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [heads, *body]
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """What a notebook shows: the best row, and how many runs there are."""
        done = sum(member.state == "finished" for member in self.members)
        rows = {
            "best": None if self.best is None else f"{self.metric} {_shown(self.best.mean)}: {settings_text(self.best.settings)}",
            "runs": f"{done} of {self.planned} finished, {len(self.failed)} failed",
            "directory": self.path,
        }  # fmt: skip
        return html_table(f"Sweep of {self.recipe}", rows)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line, safe to print."""
    return " ".join(f"{name}={short(value)}" for name, value in settings.items())


def _shown(value: float | None) -> str:
    return "" if value is None else number(value)


def read_result(sweep: SweepRecord, *, interrupted: int | None = None) -> SweepResult:
    """Read a sweep's members and order them. A run that was pruned, or whose metric is not finite, has no value."""
    members = read_members(sweep)
    first = next((m for m in members if m.metric is not None), None)
    metric, mode = (None, None) if first is None else (first.metric, first.mode)
    by_settings: dict[str, list[MemberResult]] = {}
    for member in members:
        own = {k: v for k, v in member.settings.items() if not (sweep.seeds and k == "seed")}
        key = json.dumps(own, sort_keys=True) if sweep.search == "grid" else str(member.number)
        by_settings.setdefault(key, []).append(member)
    rows = [_row(sweep, some, metric) for some in by_settings.values()]
    if mode is not None:
        sign = 1.0 if mode == "min" else -1.0
        rows.sort(key=lambda row: (row.mean is None, sign * (row.mean or 0.0)))
    return SweepResult(
        path=str(sweep.path), recipe=str(sweep.recipe["name"]), metric=metric, mode=mode, rows=tuple(rows), search=sweep.search,
        planned=sweep.size, interrupted=interrupted,
    )  # fmt: skip


def _row(sweep: SweepRecord, members: Sequence[MemberResult], metric: str | None) -> SweepRow:
    values = (m.value for m in members if m.state == "finished" and m.metric == metric)
    return SweepRow(
        settings={k: v for k, v in members[0].settings.items() if not (sweep.seeds and k == "seed")},
        members=tuple(members),
        values=tuple(value for value in values if value is not None),
    )
