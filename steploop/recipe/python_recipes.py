"""Recipes made in Python: makes what a recipe file is out of a Recipe, or of a function that builds one."""

import ast
import hashlib
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import torch

from steploop.errors import ConfigError
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import RecipeFile

__all__ = ["python_recipe"]

_STUB = '''"""This run was begun from Python, by steploop.run. What follows below shows what built its recipe."""

from pathlib import Path

from steploop.errors import ConfigError

raise ConfigError(
    "This run was begun from Python, and no file holds its recipe. Go on with it there, with the function or the Recipe "
    f"that it was begun with: steploop.run(RECIPE, resume={str(Path(__file__).parent)!r})."
)

'''
_KINDS = inspect.Parameter


def python_recipe(recipe: Recipe | Callable[..., Recipe], values: Mapping[str, Any] | None) -> RecipeFile:
    """What a recipe file would be, for a recipe that is in no file.

    Args:
        recipe: a Recipe, whose only setting is ``epochs``; or a function that builds one. Its parameters are the
            settings, and one that is called ``device`` gets the device. Where its first parameter is called
            ``config``, it gets an instance of ``Config``, as in a recipe file.
        values: the settings that are given, to refuse a function that needs others; None: those of a run that is recorded.

    Raises:
        ConfigError: the function has parameters that cannot be settings, or needs some that are not given.
    """
    if isinstance(recipe, Recipe):
        return _file("recipe", recipe.train_step, _of_value(recipe))
    function = getattr(recipe, "func", recipe)  # of a functools.partial
    name = getattr(function, "__name__", type(recipe).__name__)
    return _file("recipe" if name == "<lambda>" else name, function, _of_function(recipe, name, values))


def _file(name: str, code: Any, module_of: Callable[[str], ModuleType]) -> RecipeFile:
    text, path = "", None
    with suppress(OSError, TypeError):
        text, path = textwrap.dedent(inspect.getsource(code)), inspect.getsourcefile(code)
    try:
        ast.parse(text)
    except SyntaxError:  # a lambda in the midst of a call, say
        text = textwrap.indent(text, "# ")
    source = (_STUB + text).encode("utf-8", "backslashreplace")
    digest = hashlib.sha256(source).hexdigest()
    return RecipeFile(Path(path or name), name, source, digest, module_of(name))


def _module(name: str, config_class: type[Any], build: Callable[[Any, torch.device], Recipe]) -> ModuleType:
    module = ModuleType(f"steploop_recipe_{name}")
    module.__dict__.update(Config=config_class, build=build)
    return module


def _of_value(recipe: Recipe) -> Callable[[str], ModuleType]:
    def build(config: Any, _: torch.device) -> Recipe:
        # the run gives the state's tensors away: a copy lets the same Recipe be run again
        state = recipe.state
        own = (
            {name: one.clone() for name, one in state.items()}
            if isinstance(state, Mapping)
            else state.clone()
        )
        return attrs.evolve(recipe, state=own, epochs=config.epochs)

    return lambda name: _module(name, _config_class({"epochs": (int, recipe.epochs)}), build)


def _of_function(
    function: Callable[..., Recipe], name: str, values: Mapping[str, Any] | None
) -> Callable[[str], ModuleType]:
    parameters = dict(inspect.signature(function).parameters)
    hints: dict[str, Any] = {}
    with suppress(Exception):  # an annotation that cannot be resolved is as good as none
        hints = typing.get_type_hints(getattr(function, "func", function))
    gives_device = {"device"} & parameters.keys()
    first = next(iter(parameters.values()), None)
    if first is not None and first.name == "config":
        config_class = _given_config_class(function, name, hints.get("config"))
        if others := [
            p.name for p in parameters.values() if p.name not in {"config", "device"} and p.default is p.empty
        ]:
            raise ConfigError(
                f"{name}: a function of a config takes (config) or (config, device), but this one needs {', '.join(others)} "
                "too. Make it a field of the Config."
            )

        def arguments(config: Any) -> dict[str, Any]:
            return {"config": config}

    else:
        settings = {p.name: p for p in parameters.values() if p.name != "device"}
        if odd := [
            p.name
            for p in settings.values()
            if p.kind in {_KINDS.VAR_POSITIONAL, _KINDS.VAR_KEYWORD, _KINDS.POSITIONAL_ONLY}
        ]:
            raise ConfigError(
                f"{name}: each setting needs a name, but the function takes {', '.join(odd)}. Name its parameters, as in "
                f"def {name}(epochs=3, lr=0.1)."
            )
        if missing := [
            p.name
            for p in settings.values()
            if values is not None and p.default is p.empty and p.name not in values
        ]:
            raise ConfigError(
                f"{name} needs a value for {', '.join(missing)}. Give it by name: steploop.run({name}, {missing[0]}=...)."
            )
        config_class = _config_class({
            p.name: (hints.get(p.name, _type_of(p.default)), attrs.NOTHING if p.default is p.empty else p.default)
            for p in settings.values()
        })  # fmt: skip

        def arguments(config: Any) -> dict[str, Any]:
            return {setting: getattr(config, setting) for setting in settings}

    def build(config: Any, device: torch.device) -> Recipe:
        made = function(**arguments(config), **dict.fromkeys(gives_device, device))
        if not isinstance(made, Recipe):
            raise ConfigError(
                f"{name} must return a steploop.recipe.Recipe, but returned {type(made).__name__}."
            )
        return made

    return lambda module: _module(module, config_class, build)


def _given_config_class(function: Any, name: str, hint: Any) -> type[Any]:
    """The class of a parameter ``config``: what its annotation says, or ``Config`` where the function was defined."""
    found = hint if isinstance(hint, type) else getattr(function, "__globals__", {}).get("Config")
    if isinstance(found, type) and attrs.has(found):
        return found
    raise ConfigError(
        f"{name} takes a config, but it is not known of which class. Define Config with @attrs.frozen in the same place, or "
        "annotate the parameter with the class."
    )


def _type_of(default: Any) -> Any:
    return Any if default is inspect.Parameter.empty or default is None else type(default)


def _config_class(fields: Mapping[str, tuple[Any, Any]]) -> type[Any]:
    """A Config with fields name -> (type, default)."""
    body = {name: attrs.field(default=default) for name, (_, default) in fields.items()}
    made = type("Config", (), {"__annotations__": {name: hint for name, (hint, _) in fields.items()}, **body})
    return attrs.frozen(kw_only=True)(made)
