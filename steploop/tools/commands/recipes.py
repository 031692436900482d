"""``steploop recipes``: list the shipped recipes, one line each."""

import sys

__all__ = ["recipes"]


def recipes() -> None:
    """List the shipped recipes, one line each."""
    from steploop.recipe.recipe_files import shipped_recipes, summary_of

    found = {name: summary_of(path) for name, path in shipped_recipes().items()}
    width = max((len(name) for name in found), default=0)
    for name, summary in found.items():
        sys.stdout.write(f"{name:<{width}}  {summary}\n")
