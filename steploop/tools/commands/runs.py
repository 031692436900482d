"""``steploop runs``: a table of the runs below a directory."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steploop.runs.reading import RunRecord

__all__ = ["runs"]

ROOT = typer.Argument(help="The directory to look below.")
JSON = typer.Option("--json", help="One JSON list instead of a table.")


def runs(root: Annotated[Path, ROOT] = Path("runs"), as_json: Annotated[bool, JSON] = False) -> None:
    """List the runs below ROOT: recipe, what differs in their Config, best metric, steps, time, state."""
    from steploop.runs.reading import find_runs, read_run
    from steploop.tools.report.run_labels import differences, short

    records = [read_run(path) for path in find_runs(root)]
    if as_json:
        sys.stdout.write(json.dumps([_entry(record) for record in records], indent=2, allow_nan=False) + "\n")
        return
    if not records:
        sys.stdout.write(f"There are no runs below {root}.\n")
        return
    from rich.console import Console
    from rich.table import Table

    from steploop.tools.commands.terminals import window_width
    from steploop.tools.report.charts import number
    from steploop.tools.report.results import duration

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("run", "recipe", "differs in", "metric", "steps", "time", "state"):
        table.add_column(
            head,
            justify="right" if head in {"steps", "time"} else "left",
            overflow="fold",
            no_wrap=head != "differs in",
        )
    for record in records:
        entry = _entry(record)
        # what tells it from the other runs of its recipe
        different = differences(
            [other for other in records if other.recipe == record.recipe and other.fields]
        )
        settings = " ".join(f"{k}={short(record.fields[k])}" for k in different if k in record.fields)
        metric = (
            ""
            if entry["metric"] is None
            else f"{entry['metric']} {number(entry['value']) if entry['value'] is not None else 'not finite'}"
        )
        steps = f"{entry['steps']:,}" + (f" (+{entry['skipped']} skipped)" if entry["skipped"] else "")
        table.add_row(
            entry["run"], entry["recipe"], settings, metric, steps, duration(entry["time_s"]), entry["state"]
        )
    wide = sys.stdout.isatty()  # into a file or a pipe goes every line whole
    Console(file=sys.stdout, width=window_width() if wide else 1000, highlight=False, markup=False).print(
        table
    )


def _entry(record: "RunRecord") -> dict[str, Any]:
    """What there is to say of a run, as plain values."""
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
    }
