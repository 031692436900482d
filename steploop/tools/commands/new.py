"""``steploop new``: begin a recipe as a copy of a shipped one."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from steploop.errors import ConfigError, RunExistsError
from steploop.tools.commands.completion import complete_recipe

__all__ = ["adapted", "new"]

# The paragraph of a recipe's header that holds for the shipped file only.
_MEASURED = re.compile(r"^Measured\b.*?(?=\n\n|\n?\"\"\")", re.DOTALL | re.MULTILINE)


def new(
    name: Annotated[str, typer.Argument(help="The new file: NAME.py in this folder, or a path.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="RECIPE",
            help="A shipped recipe (`steploop recipes` lists them) or a file.",
            autocompletion=complete_recipe,
        ),
    ] = "mnist",
) -> None:
    """Begin your own recipe as a copy of another.

    Never overwrites a file.
    """
    from steploop.recipe.recipe_paths import find_recipe

    original = find_recipe(source)
    target = Path(name if name.endswith(".py") else f"{name}.py")
    if not target.stem.isidentifier():
        raise ConfigError(
            f"A recipe's name must be a Python identifier, such as my_recipe, but got {target.stem!r}. "
            "Use letters, digits and underscores."
        )
    text = adapted(original.read_text(encoding="utf-8"), original.stem, target)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RunExistsError(
            f"{target} exists and was not changed. Choose another name, or move it away."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror}. Choose a folder that exists and that you may write to."
        ) from error
    sys.stdout.write(f"{target}: a copy of {original.stem}. Change it, then: steploop run {target}\n")


def adapted(text: str, recipe: str, target: Path) -> str:
    """Adapt a recipe's header to a new file: its name in the commands, no measured claim."""
    from steploop import __version__

    header, quotes, body = text.partition('"""\n\n')
    header = re.sub(rf"(?<!\S)(?:\S*/)?{re.escape(recipe)}\.py\b", lambda _: target.as_posix(), header)
    claim = f"Begun as a copy of {recipe} (steploop {__version__}); nothing is measured yet."
    header = _MEASURED.sub(lambda _: claim, f"{header}{quotes}", count=1)
    return header + body
