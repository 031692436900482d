"""``steploop runs``: list the runs below a directory."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steploop.runs.reading import RunRecord

__all__ = ["runs"]

ROOT = typer.Argument(help="The directory to look below.")
JSON = typer.Option("--json", help="One JSON list instead of a table.")
_HEADS = ("run", "recipe", "differs in", "metric", "steps", "time", "state")


def runs(root: Annotated[Path, ROOT] = Path("runs"), as_json: Annotated[bool, JSON] = False) -> None:
    """List the runs below ROOT: what differs, best metric, state."""
    from steploop.runs.reading import find_runs
    from steploop.runs.safe_text import safe_text

    records = [_read(path) for path in find_runs(root)]
    if as_json:
        sys.stdout.write(json.dumps([_entry(record) for record in records], indent=2, allow_nan=False) + "\n")
        return
    if not records:
        sys.stdout.write(f"There are no runs below {safe_text(root)}.\n")
        return
    _show(_rows(records))
    for record in records:
        for problem in record.problems:
            sys.stdout.write(f"{safe_text(record.path)}: {safe_text(problem)}\n")


def _read(path: Path) -> "RunRecord":
    """Read a run, or say what is wrong with it: one bad run does not hide the others."""
    from steploop.errors import SteploopError
    from steploop.runs.reading import RunRecord, read_run

    try:
        return read_run(path)
    except (SteploopError, OSError) as error:  # it may be removed at this very moment
        return RunRecord(path=path, problems=(str(error),))


def _entry(record: "RunRecord") -> dict[str, Any]:
    """Describe a run as plain values."""
    from steploop.tools.report.results import result_of

    result = result_of(record)
    return {
        "run": str(record.path),
        "recipe": record.recipe,
        "config": dict(record.fields),
        "metric": None if result is None else result.metric,
        "value": None if result is None else result.value,
        "metrics": {} if result is None else dict(result.metrics),
        "steps": record.steps,
        "attempted": record.attempted,
        "skipped": record.skipped,
        "time_s": round(record.time_s, 3),
        "state": record.state,
        "problems": list(record.problems),
    }


def _rows(records: Sequence["RunRecord"]) -> list[list[str]]:
    """Make a row of cells for each run, safe to print."""
    from steploop.runs.safe_text import safe_text
    from steploop.tools.report.charts import number
    from steploop.tools.report.results import duration
    from steploop.tools.report.run_labels import differences, short

    by_recipe: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.fields:
            by_recipe.setdefault(record.recipe, []).append(record)
    # what tells a run from the others of its recipe
    different: Mapping[str, Any] = {recipe: differences(some) for recipe, some in by_recipe.items()}
    rows = []
    for record in records:
        entry = _entry(record)
        telling = (k for k in different.get(record.recipe, ()) if k in record.fields)
        settings = " ".join(f"{k}={short(record.fields[k])}" for k in telling)
        value = "not finite" if entry["value"] is None else number(entry["value"])
        metric = "" if entry["metric"] is None else f"{entry['metric']} {value}"
        steps = f"{entry['steps']:,}" + (f" (+{entry['skipped']} skipped)" if entry["skipped"] else "")
        state = entry["state"] + (", damaged" if record.problems else "")
        cells = (entry["run"], entry["recipe"], settings, metric, steps, duration(entry["time_s"]), state)
        rows.append([safe_text(cell) for cell in cells])
    return rows


def _show(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, or a few lines for each run in a window that is too narrow for it."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from steploop.tools.commands.terminals import window_width

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in _HEADS:
        table.add_column(head, justify="right" if head in {"steps", "time"} else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=sys.stdout, width=1_000_000, highlight=False, markup=False, emoji=False)
    wanted = Measurement.get(console, console.options, table).maximum
    if not sys.stdout.isatty():  # into a file or a pipe goes every line whole
        console.width = wanted
        console.print(table)
        return
    console.width = window_width()
    if wanted <= console.width:
        console.print(table)
        return
    for name, recipe, settings, metric, steps, time, state in rows:
        console.print(Text.assemble((name, "bold"), f"  {state}"))
        details = (f"{recipe} {settings}".strip(), metric, f"{steps} steps, {time}")
        console.print(Padding(Text("\n".join(line for line in details if line)), (0, 0, 0, 2)))
