"""Load recipe files, and check what a recipe must have."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch

from steploop.core.file_modules import load_file
from steploop.errors import ConfigError, MissingExtraError, SteploopError
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_paths import shipped_recipes

__all__ = ["RecipeFile", "load_recipe_file"]


@attrs.frozen
class RecipeFile:
    """A recipe file that was loaded.

    Attributes:
        path: the file.
        name: its name without ``.py``.
        source: its bytes.
        sha256: their digest, as hexadecimal digits.
        module: what it defines.
    """

    path: Path
    name: str
    source: bytes = attrs.field(repr=False)
    sha256: str
    module: ModuleType = attrs.field(repr=False)

    @property
    def config_class(self) -> type[Any]:
        """The recipe's ``Config``, an attrs class."""
        found: type[Any] = self.module.Config
        return found

    @property
    def build(self) -> Callable[[Any, torch.device], Recipe]:
        """The recipe's ``build(config, device) -> Recipe``."""
        found: Callable[[Any, torch.device], Recipe] = self.module.build
        return found


def load_recipe_file(path: Path, *, beside: Path | None = None) -> RecipeFile:
    """Run a recipe file and check that it has a ``Config`` and a ``build``.

    Args:
        path: the file.
        beside: the folder whose modules it may import; its own unless given.

    Raises:
        ConfigError: it cannot be read or run, or lacks something; says what and where.

    Example:
        >>> file = load_recipe_file(find_recipe("mnist"))
        >>> recipe = file.build(file.config_class(data="digits"), torch.device("cpu"))
        >>> recipe.monitor
        'accuracy'
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    folder = str((beside or path.parent).resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    # its own name, so that no recipe hides a module, and a worker process finds its classes by it
    name = f"steploop_recipe_{path.stem}"
    try:
        module = load_file(name, path, source)
    except SteploopError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and path in shipped_recipes().values():
            raise MissingExtraError(
                f"The recipe {path.stem} needs {error.name}, which is not installed. "
                "Install it with: pip install 'steploop[recipes]'"
            ) from error
        raise ConfigError(
            f"The recipe {path} cannot be loaded: {type(error).__name__}: {error}{_line(error, path)}. "
            "steploop --debug run shows the traceback."
        ) from error
    _check(module, path)
    return RecipeFile(path, path.stem, source, hashlib.sha256(source).hexdigest(), module)


def _line(error: Exception, path: Path) -> str:
    """Find the line of the recipe that an error comes from, if known."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" (line {line})"


def _check(module: ModuleType, path: Path) -> None:
    config = getattr(module, "Config", None)
    if not (isinstance(config, type) and attrs.has(config)):
        raise ConfigError(
            f"The recipe {path} needs a class Config made with @attrs.frozen, whose fields --set can change."
        )
    if without := [f.name for f in attrs.fields(config) if f.init and f.default is attrs.NOTHING]:
        raise ConfigError(
            f"The recipe {path}: every field of Config needs a default, but {', '.join(without)} has none."
        )
    if not callable(getattr(module, "build", None)):
        raise ConfigError(
            f"The recipe {path} needs a function build(config, device) that returns a steploop.recipe.Recipe."
        )
