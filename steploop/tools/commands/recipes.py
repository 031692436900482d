"""``steploop recipes``: list the shipped recipes, one line each."""

import sys

from steploop.tools.commands.terminals import definitions

__all__ = ["listed_recipes", "recipes"]


def recipes() -> None:
    """List the shipped recipes, one line each."""
    sys.stdout.write("".join(f"{line}\n" for line in listed_recipes()))


def listed_recipes(*, indent: int = 0) -> list[str]:
    """The shipped recipes and what each is about, as lines that fit the terminal."""
    from steploop.recipe.recipe_paths import shipped_recipes, summary_of

    return definitions([(name, summary_of(path)) for name, path in shipped_recipes().items()], indent=indent)
