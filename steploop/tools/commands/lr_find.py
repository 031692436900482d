"""``steploop lr-find``: run a learning-rate range test, draw it, and suggest a rate."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from steploop.tools.commands.run_options import DEVICE, RECIPE, SET

__all__ = ["lr_find"]

LOW = typer.Option(help="The first learning rate.")
HIGH = typer.Option(help="The last learning rate.")
STEPS = typer.Option(help="Steps to take at most.")
STATE = typer.Option(
    "--state", help="Whose rate to vary, where a recipe trains several states.", show_default=False
)
OUT = typer.Option(
    help="Where to draw the curve, without the ending. Default: lr-find-<recipe>.", show_default=False
)


def lr_find(
    recipe: Annotated[str, RECIPE],
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    low: Annotated[float, LOW] = 1e-6,
    high: Annotated[float, HIGH] = 10.0,
    steps: Annotated[int, STEPS] = 100,
    which: Annotated[str | None, STATE] = None,
    device: Annotated[str, DEVICE] = "auto",
    out: Annotated[Path | None, OUT] = None,
) -> None:
    """Search a learning rate for RECIPE by a range test.

    Raises the rate step by step on a copy of the state, draws the loss over it, and suggests a rate.
    """
    from steploop.errors import MissingExtraError
    from steploop.recipe.config_values import configure, split_assignments
    from steploop.recipe.recipe_files import load_recipe_file
    from steploop.recipe.recipe_paths import find_recipe
    from steploop.runs.environment import find_device
    from steploop.tools.lr_finder import RangeTest, range_test
    from steploop.tools.report.terminal_plots import draw_curve, falling_window

    plan = RangeTest(low=low, high=high, steps=steps)
    file = load_recipe_file(find_recipe(recipe))
    config = configure(file.config_class, split_assignments(overrides or []), where=file.name)
    found = range_test(file.build(config, find_device(device)), plan, which=which)
    ends = (f"lr {found.rates[0]:.2g}", f"{found.rates[-1]:.2g}")
    lines = draw_curve(
        found.smooth,
        title="loss, smoothed",
        width=72,
        height=8,
        ends=ends,
        bounds=falling_window(found.smooth),
    )
    sys.stderr.write("\n".join(lines) + "\n")
    stem = out or Path(f"lr-find-{file.name}")
    stem = stem.with_suffix("") if stem.suffix in {".png", ".svg"} else stem
    pictures: list[str] = []
    try:
        from steploop.tools.report.figures import draw_range_test, save

        figure = draw_range_test(
            found.rates, found.losses, found.smooth, found.suggestion, f"Range test of {file.name}"
        )
        pictures = [str(path) for path in save(figure, stem)]
    except MissingExtraError as error:  # the answer does not need the picture
        sys.stderr.write(f"{error}\n")
    if found.suggestion is None:
        sys.stderr.write(f"No suggestion. {found.rule}\n")
    else:
        sys.stderr.write(f"Suggestion: {found.suggestion:.2g}: {found.rule}.\n")
    line = {
        "recipe": file.name,
        "suggestion": found.suggestion,
        "rule": found.rule,
        "steps": len(found.rates),
        "pictures": pictures,
    }
    sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
