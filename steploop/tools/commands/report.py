"""``steploop report``: write one HTML file about runs, or about a sweep."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from steploop.tools.commands.completion import complete_run

__all__ = ["report"]

RUNS = typer.Argument(
    help="Run directories; several are compared. Or the directory of a sweep.",
    show_default=False,
    autocompletion=complete_run,
)
OUT = typer.Option(
    help="The file. Default: report.html in the run directory, or here for several runs.", show_default=False
)


def report(runs: Annotated[list[Path], RUNS], out: Annotated[Path | None, OUT] = None) -> None:
    """Write one HTML file about RUNS, which needs no network.

    The result, curves, evaluations, the recipe and how to run it again.
    """
    from steploop.runs.reading import read_run
    from steploop.runs.safe_text import safe_text
    from steploop.tools.report.output_files import write_output
    from steploop.tools.report.pages import report as page
    from steploop.tools.sweep.sweep_page import sweep_page
    from steploop.tools.sweep.sweep_record import sweep_among

    sweep = sweep_among(runs)
    text = page([read_run(path) for path in runs]) if sweep is None else sweep_page(sweep)
    target = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_output(target, text.encode("utf-8", "backslashreplace"))
    sys.stdout.write(f"{safe_text(target)}\n")
