"""Find recipe files by path or name, without loading them or torch."""

import ast
from pathlib import Path

from steploop.errors import ConfigError
from steploop.recipe.config_values import nearest

__all__ = ["find_recipe", "shipped_recipes", "summary_of"]


def _folder() -> Path:
    """Find the folder of the shipped recipes: in the wheel, or next to the package in a checkout."""
    here = Path(__file__).parents[1]
    return here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Map the name of each shipped recipe to its file, sorted.

    Example:
        >>> "mnist" in shipped_recipes()
        True
    """
    return {path.stem: path for path in sorted(_folder().glob("*.py")) if not path.name.startswith("_")}


def summary_of(path: Path) -> str:
    """Read the first line of a recipe's docstring without running it."""
    document = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return document.partition("\n")[0]


def find_recipe(name: str) -> Path:
    """Find the file of a recipe by its path, or by the name of a shipped one.

    Raises:
        ConfigError: there is neither; the nearest name is said.

    Example:
        >>> find_recipe("mnist").name
        'mnist.py'
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise ConfigError(
            f"{name} is a directory. Give the recipe's file, or --resume {name} to go on with a run."
        )
    own = path.with_name(f"{path.name}.py")
    meant = f"Did you mean {own}?" if own.is_file() else nearest(path.stem, list(shipped))
    raise ConfigError(f"There is no recipe {name!r}: neither a file nor a shipped recipe. {meant}")
