"""``steploop plot``: draw the curves of runs, or the results of a sweep, as PNG and SVG."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steploop.errors import ConfigError
from steploop.tools.commands.completion import complete_run

if TYPE_CHECKING:
    from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["plot"]

RUNS = typer.Argument(
    help="Run directories; several are drawn over each other. Or the directory of a sweep.",
    show_default=False,
    autocompletion=complete_run,
)
METRIC = typer.Option(
    "--metric",
    metavar="NAME",
    help="Draw only this (loss, accuracy, learning_rate, grad_norm, ...); may be repeated.",
)
OUT = typer.Option(
    help="Where to write, without the ending. Default: curves in the run directory, or here for several runs.",
    show_default=False,
)
TERMINAL = typer.Option("--terminal", help="Draw in the terminal; writes no file.")
_MOST_PANELS = 40


def plot(
    runs: Annotated[list[Path], RUNS],
    metrics: Annotated[list[str] | None, METRIC] = None,
    out: Annotated[Path | None, OUT] = None,
    terminal: Annotated[bool, TERMINAL] = False,
) -> None:
    """Draw the curves of RUNS as PNG and SVG.

    Loss, metrics, learning rate, gradient norms and loss scale.
    """
    from steploop.runs.reading import read_run
    from steploop.runs.safe_text import safe_text
    from steploop.tools.report.panels import arrange, select
    from steploop.tools.sweep.sweep_record import sweep_among

    stem = out.with_suffix("") if out is not None and out.suffix in {".png", ".svg"} else out
    if (sweep := sweep_among(runs)) is not None:
        if metrics or terminal:
            raise ConfigError(
                "--metric and --terminal are about curves of runs. Leave them out, or name runs of the sweep."
            )
        _plot_sweep(sweep, stem or runs[0] / "sweep")
        return
    records = [read_run(path) for path in runs]
    for problem in (problem for record in records for problem in record.problems):
        sys.stderr.write(f"{safe_text(problem)}\n")
    chosen = select(arrange(records), metrics or [])
    if not chosen:
        sys.stdout.write("Nothing was logged yet: there is nothing to draw.\n")
        return
    if terminal:
        from steploop.tools.commands.terminals import window_width
        from steploop.tools.report.terminal_plots import draw_grid

        curves = {
            f"{panel.title} · {series.label}" if series.label else panel.title: series.curve
            for panel in chosen
            for series in panel.series
            if series.style != "faint"
        }
        ends = {name: (f"step {curve.steps[0]}", str(curve.steps[-1])) for name, curve in curves.items()}
        values = {name: curve.values for name, curve in curves.items()}
        sys.stdout.write(draw_grid(values, ends=ends, width=window_width(), same_scale=False) + "\n")
        return
    from steploop.tools.report.figures import draw_panels, save

    if len(chosen) > _MOST_PANELS:  # matplotlib lays out no more in a reasonable time
        left = [panel.key for panel in chosen[_MOST_PANELS:]]
        sys.stderr.write(
            f"Drawn are the first {_MOST_PANELS} of {len(chosen)} panels. Name others with --metric, such as {safe_text(left[0])}.\n"
        )
        chosen = chosen[:_MOST_PANELS]
    stem = stem or (runs[0] / "curves" if len(runs) == 1 else Path("curves"))
    title = ", ".join(dict.fromkeys(record.recipe for record in records))
    for path in save(draw_panels(chosen, title), stem):
        sys.stdout.write(f"{safe_text(path)}\n")


def _plot_sweep(sweep: "SweepRecord", stem: Path) -> None:
    """Draw the metric against each setting, and parallel coordinates."""
    from steploop.runs.safe_text import safe_text
    from steploop.tools.report.figures import save
    from steploop.tools.sweep.sweep_axes import sweep_axes
    from steploop.tools.sweep.sweep_figure import draw_sweep
    from steploop.tools.sweep.sweep_result import read_result

    result = read_result(sweep)
    axes = sweep_axes(result)
    if axes is None or not axes.settings:
        sys.stdout.write("No two runs have a result and differ in a setting yet: there is nothing to draw.\n")
        return
    for path in save(draw_sweep(axes, f"Sweep of {result.recipe}"), stem):
        sys.stdout.write(f"{safe_text(path)}\n")
