"""``steploop schedules``: draw learning-rate schedules before training."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["schedules"]

NAMES = typer.Argument(help="Which; all of them if none is named.", show_default=False)
STEPS = typer.Option("--steps", min=2, max=1_000_000, help="Steps to draw.")
RATE = typer.Option("--lr", help="The highest learning rate.")
TERMINAL = typer.Option("--terminal", help="Draw in the terminal; writes no file.")
OUT = typer.Option(help="Where to write, without the ending.")


def schedules(
    names: Annotated[list[str] | None, NAMES] = None,
    steps: Annotated[int, STEPS] = 1000,
    lr: Annotated[float, RATE] = 0.1,
    terminal: Annotated[bool, TERMINAL] = False,
    out: Annotated[Path, OUT] = Path("schedules"),
) -> None:
    """Draw learning-rate schedules, as figures or in the terminal."""
    from steploop.tools.report.schedule_previews import preview_schedules

    preview = preview_schedules(names or [], steps=steps, lr=lr)
    if terminal:
        from steploop.tools.commands.terminals import window_width
        from steploop.tools.report.terminal_plots import draw_grid

        sys.stdout.write(draw_grid(preview.rates, width=window_width()) + "\n")
        return
    from steploop.tools.report.figures import draw_schedules, save

    stem = out.with_suffix("") if out.suffix in {".png", ".svg"} else out
    for path in save(draw_schedules(preview.rates, preview.momenta), stem):
        sys.stdout.write(f"{path}\n")
