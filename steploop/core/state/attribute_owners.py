"""The objects that hang on a model's layers and have attributes of their own, by the way that leads to each."""

import functools
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

__all__ = ["MOST_ITEMS", "OF_TORCH", "hooks_of", "is_a_librarys", "items_of", "objects_on", "values_of"]

MOST_ITEMS = 1000  # a container that is larger is a table, not a value of the next step
_MOST_DEEP = 4

# What every module has: parameters, buffers, layers, hooks, the mode.
OF_TORCH = frozenset(vars(nn.Module()))

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks_of(module: nn.Module) -> Iterator[Any]:
    """The hooks of a module, without its children, and those of its parameters."""
    for kind in _HOOKS:
        yield from getattr(module, kind).values()
    for param in module._parameters.values():
        if param is not None:
            yield from (param._backward_hooks or {}).values()
            yield from (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()


def objects_on(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The objects of the user's own that hang on layers, each under the first path that leads to it.

    They hang there as attributes, as hooks, in lists and dictionaries, and on each other.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str, depth: int) -> None:
        if depth > _MOST_DEEP or id(value) in seen:
            return
        seen.add(id(value))
        if _is_users(value):
            found[path] = value
        for key, child in _children(value).items():
            walk(child, f"{path}.{key}", depth + 1)

    for path, module in modules.items():
        for name, value in list(module.__dict__.items()):
            if name not in OF_TORCH:
                walk(value, f"{path}.{name}".removeprefix("."), 1)
        for number, hook in enumerate(hooks_of(module)):
            walk(hook, f"{path}.hook {number}".removeprefix("."), 1)
    return found


def _children(value: Any) -> dict[Any, Any]:
    """What a value leads to, by name or number."""
    if (items := items_of(value, MOST_ITEMS)) is not None:
        return items
    return dict(values_of(value)) if _is_users(value) else {}


def items_of(value: Any, most: int) -> dict[Any, Any] | None:
    """What a partial function, a bound method or a container holds, by name or number; None for any other value.

    A container of more than ``most`` items is a table, and holds nothing to look at.
    """
    if isinstance(value, functools.partial):  # of whose keywords none is named func()
        return {**dict(enumerate(value.args)), **value.keywords, "func()": value.func}
    if isinstance(value, types.MethodType):
        return {"self": value.__self__}
    if isinstance(value, list | tuple | deque | dict):
        few = len(value) <= most
        return dict(value if isinstance(value, dict) else enumerate(value)) if few else {}
    return None


def _is_users(value: Any) -> bool:
    """Whether a value is an object with attributes, of no class of a library that keeps to itself."""
    if isinstance(value, nn.Module | Tensor | type | types.FunctionType | types.ModuleType):
        return False
    if is_a_librarys(type(value)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or bool(_slots_of(type(value)))


class _Slots(MutableMapping[str, Any]):
    """The attributes that an object keeps in slots."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in _slots_of(type(self._owner)) if hasattr(self._owner, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _slots_of(kind: type) -> list[str]:
    return [
        k for one in kind.__mro__ for k, v in vars(one).items() if isinstance(v, types.MemberDescriptorType)
    ]


def values_of(owner: Any) -> MutableMapping[str, Any]:
    """The attributes of a layer or an object, as a mapping that one may write to."""
    found = getattr(owner, "__dict__", None)
    return found if isinstance(found, dict) else _Slots(owner)


def is_a_librarys(kind: type) -> bool:
    """Whether a class is of Python's library, or of one whose objects keep to themselves."""
    package = kind.__module__.partition(".")[0]
    known = package in sys.stdlib_module_names and package not in {"__main__", "types", "argparse"}
    return known or package in {"torch", "numpy", "steploop"}
