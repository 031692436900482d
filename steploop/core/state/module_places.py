"""The places in a module where parameters and buffers stand, and the names of what it holds."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["Place", "names_in", "places_in_lists", "registered_places"]

# (dictionary or list, key, name of the value): somewhere a parameter or buffer stands
Place = tuple[Any, Any, str]


def registered_places(
    modules: Mapping[str, nn.Module], kind: str, names: Mapping[int, str], *, empty: bool = False
) -> list[Place]:
    """The places of registered values; a tied one stands in several places under one name.

    Args:
        modules: path -> module.
        kind: "_parameters" or "_buffers".
        names: id of a value -> its name.
        empty: whether to find the places where None stands, too.
    """
    return [
        (where, key, names.get(id(value)) or f"{path}.{key}".removeprefix("."))
        for path, module in modules.items()
        for where in [getattr(module, kind)]
        for key, value in where.items()
        if value is not None or empty
    ]


def places_in_lists(modules: Mapping[str, nn.Module], names: Mapping[int, str]) -> list[Place]:
    """The places of parameters in plain lists and dictionaries of a module: they move with the registered ones."""
    found: list[Place] = []
    for module in modules.values():
        for attribute, value in vars(module).items():
            if (
                type(value) in {list, dict}
                and value
                and attribute not in {"_parameters", "_buffers", "_modules"}
            ):
                items = enumerate(value) if type(value) is list else value.items()
                found += [(value, key, names[id(item)]) for key, item in items if id(item) in names]
    return found


def names_in(model: nn.Module) -> list[str]:
    """The names of parameters, of buffers (those that are None too), and of layers that have neither."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        own = [*(name for name, p in module._parameters.items() if p is not None), *module._buffers]
        found |= dict.fromkeys([f"{path}.{name}".removeprefix(".") for name in own] or [path])
    return list(found)
