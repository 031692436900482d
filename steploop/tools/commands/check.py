"""``steploop check``: proves a recipe against the laws, and shows what fails in a table."""

import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steploop.tools.check.verdicts import Verdict

__all__ = ["check"]

RECIPE = typer.Argument(help="A recipe file, or the name of a shipped recipe.", show_default=False)
SET = typer.Option(
    "--set", metavar="NAME=VALUE", help="A field of the recipe's Config; may be given several times."
)
DEVICE = typer.Option(help="auto, cpu, cuda (cuda:1) or mps.")
SAMPLES = typer.Option(min=3, help="Samples of a batch to use.")
JSON = typer.Option("--json", help="One JSON object instead of a table.")


def check(
    recipe: Annotated[str, RECIPE],
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    device: Annotated[str, DEVICE] = "auto",
    samples: Annotated[int, SAMPLES] = 8,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Build RECIPE small and put every law that applies to it; exit code 1 if one fails."""
    # cuBLAS is deterministic only if it is told before it starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from steploop.recipe.config_values import split_assignments
    from steploop.recipe.recipe_files import find_recipe
    from steploop.runs.environment import find_device
    from steploop.tools.check.subjects import Subject
    from steploop.tools.check.verdicts import examine

    path, values, place = find_recipe(recipe), dict(split_assignments(overrides or [])), find_device(device)
    found: dict[str, list[Verdict]] = {}
    phase, more = 0, True
    while more:
        subject = Subject(path=path, values=values, device=place, samples=samples, phase=phase)
        name = path.stem if phase == 0 else f"{path.stem}, phase {phase + 1}"
        more = subject.recipe.then is not None
        found[name] = list(examine(subject, partial(_note, name)))
        phase += 1
    if as_json:
        import attrs

        entry = {name: [attrs.asdict(v) for v in verdicts] for name, verdicts in found.items()}
        sys.stdout.write(json.dumps(entry, indent=2, allow_nan=False) + "\n")
    else:
        for name, verdicts in found.items():
            _print_table(name, verdicts)
    if any(v.passed is False for verdicts in found.values() for v in verdicts):
        raise SystemExit(1)


def _note(recipe: str, law: str) -> None:
    """What is being tried, on one line of the screen that the next one overwrites."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{recipe}: {law}" if law else "\r\x1b[K")
        sys.stderr.flush()


def _print_table(name: str, verdicts: "list[Verdict]") -> None:
    from rich.console import Console
    from rich.table import Table

    _note(name, "")
    words: dict[Any, str] = {True: "passed", False: "FAILED", None: "does not apply"}
    table = Table(title=name, title_justify="left", show_lines=any(v.passed is False for v in verdicts))
    for column in ("law", "result", "cases", "smallest failing example"):
        table.add_column(column, justify="right" if column == "cases" else "left", overflow="fold")
    for v in verdicts:
        what = f"{v.example}: {v.message}" if v.passed is False else v.message
        table.add_row(v.law, words[v.passed], str(v.cases or ""), what)
    # a table in a file or a pipe is not cut at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(table)
