"""Complete what is typed in a shell: recipes, their settings, run directories. Reads files, runs none."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

__all__ = ["WORDS", "complete_recipe", "complete_run", "complete_setting", "recipe_among"]

WORDS = "steploop.words"  # in Context.meta: the words after the command
_UsageError: Any = typer.BadParameter.__base__  # click's; newer versions of typer bring a click of their own

_Found = list[str | tuple[str, str]]


def complete_recipe(incomplete: str) -> _Found:
    """The shipped recipes by name, and Python files and folders by path."""
    from steploop.recipe.recipe_paths import shipped_recipes, summary_of

    named = [
        (name, summary_of(path)) for name, path in shipped_recipes().items() if name.startswith(incomplete)
    ]
    files = [
        str(path) for path in _paths(incomplete) if path.suffix == ".py" and not path.name.startswith(".")
    ]
    return [*named, *files, *_folders(incomplete)]


def complete_run(incomplete: str) -> _Found:
    """Run directories: those in ``runs/``, and those on the path that is typed."""
    from steploop.runs.standing import is_run

    found = {str(path) for path in (*_paths("runs/"), *_paths(incomplete)) if path.is_dir() and is_run(path)}
    runs = sorted(path for path in found if path.startswith(incomplete))
    return [*runs, *(path for path in _folders(incomplete) if path.rstrip("/") not in found)]


def complete_setting(ctx: Any, incomplete: str) -> _Found:
    """``name=default`` of each setting of the recipe that was typed, with its comment."""
    from steploop.errors import ConfigError
    from steploop.recipe.written_settings import settings_in

    try:
        path = recipe_among(ctx)
        found = [] if path is None else settings_in(path)
    except ConfigError:
        return []
    assignments = ((f"{one.name}={one.default}", one.comment) for one in found)
    return [pair for pair in assignments if pair[0].startswith(incomplete)]


def recipe_among(ctx: Any) -> Path | None:
    """Find the file of the recipe that a command is given; for a run, the copy in its directory.

    Args:
        ctx: of the command, whose words need not be complete.

    Raises:
        ConfigError: there is no such recipe.
    """
    from steploop.recipe.recipe_paths import find_recipe

    given = _given(ctx)
    if recipe := given.get("recipe"):
        return find_recipe(str(recipe))
    run = given.get("directory") or given.get("resume_from")
    copy = Path(run) / "recipe.py" if run else None
    return copy if copy is not None and copy.is_file() else None


def _given(ctx: Any) -> dict[str, Any]:
    """The options and arguments among the words, as they were typed."""
    words = [word for word in ctx.meta.get(WORDS, []) if word not in ctx.help_option_names]
    before = ctx.ignore_unknown_options, ctx.resilient_parsing
    ctx.ignore_unknown_options, ctx.resilient_parsing = True, False
    try:
        for more in ([], ["VALUE"]):  # the last word may be an option whose value is being typed
            with suppress(_UsageError):
                found: dict[str, Any] = ctx.command.make_parser(ctx).parse_args(args=[*words, *more])[0]
                return found
        return {}
    finally:
        ctx.ignore_unknown_options, ctx.resilient_parsing = before


def _paths(incomplete: str) -> Iterator[Path]:
    """What there is in a folder whose path begins with what is typed."""
    folder, start = os.path.split(incomplete)
    try:
        with os.scandir(folder or ".") as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith(start))
    except OSError:
        return
    yield from (Path(folder, name) for name in names)


def _folders(incomplete: str) -> list[str]:
    shown = (path for path in _paths(incomplete) if not path.name.startswith(("_", ".")))
    return [f"{path}/" for path in shown if path.is_dir()]
