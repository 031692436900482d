"""Modules that an objective computes with besides its state's: what their buffers become, no state holds."""

import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from steploop.core.state.attribute_owners import items_of
from steploop.errors import ConfigError

__all__ = ["buffers_beside", "refuse_changed"]

_MOST_DEEP = 3
_MOST_ITEMS = 100

# (module, name of its buffer) -> what tells its value from another
_Marks = dict[tuple[nn.Module, str], tuple[int, int]]


def buffers_beside(objective: Callable[..., Any], model: nn.Module) -> _Marks:
    """The buffers of modules that an objective refers to, and that nobody trains: losses, teachers.

    One with parameters to train is another state's model, or a second copy by mistake, which gives no gradient.
    """
    own = set(model.modules())
    found: _Marks = {}
    for root in _modules_of(objective, 0, set()):
        others = [module for module in root.modules() if module not in own]
        trained = any(p.requires_grad for m in others for p in m.parameters(recurse=False))
        if not trained:
            found |= {
                (module, name): (id(buffer), buffer._version)
                for module in others
                for name, buffer in module.named_buffers(recurse=False)
                if not buffer.is_inference()
            }
    return found


def refuse_changed(before: _Marks) -> None:
    """Raise ConfigError for a buffer that has changed."""
    for (module, name), mark in before.items():
        now = getattr(module, name, None)
        if now is None or (id(now), now._version) != mark:
            raise ConfigError(
                f"The objective changes the buffer {name} of a {type(module).__name__} that is no part of the model. No state holds it, "
                "so that a copied or resumed run would compute something else. Make that module a layer of the model "
                "(model.criterion = ...), or put it into eval mode if it is not to change."
            )


def _modules_of(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a function, or an object that is called, refers to."""
    if isinstance(value, nn.Module):
        yield value
        return
    if depth > _MOST_DEEP or id(value) in seen:
        return
    seen.add(id(value))
    for child in _referred_to(value):
        yield from _modules_of(child, depth + 1, seen)


def _referred_to(value: Any) -> list[Any]:
    if (items := items_of(value, _MOST_ITEMS)) is not None:
        return [*([value.__func__] if isinstance(value, types.MethodType) else []), *items.values()]
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        named = [value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__]
        return [*cells, *named, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    attributes = getattr(value, "__dict__", None)
    return list(attributes.values()) if callable(value) and isinstance(attributes, dict) else []


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty one
        return None
