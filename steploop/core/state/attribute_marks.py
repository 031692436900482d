"""What an attribute's value looks like, so that a change of it is seen; copies of it; what a state can hold of it."""

import copy
import dataclasses
import itertools
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import attrs
import numpy as np
from torch import Tensor, nn

from steploop.core.state.attribute_owners import MOST_ITEMS, is_a_librarys
from steploop.core.state.copying import lazy_clone
from steploop.core.trees import map_tensors, unkeepable

__all__ = ["OTHER", "Refused", "copied", "held", "like", "look_of", "lost", "mark", "plain", "write"]

OTHER = object()  # the mark of a value that no state holds, and of which nobody can see whether it changes
_MOST_BYTES = 1 << 20  # of an array: a larger one is a table

# containers that are held as a list or a dictionary
_AS_PLAIN: dict[type, type] = {deque: list, OrderedDict: dict, defaultdict: dict, Counter: dict}

# by their names: torch.compile around a step of ours cannot follow the classes
_GENERATORS: dict[str, Callable[[Any], Any]] = {
    "torch._C.Generator": lambda g: g.get_state().numpy().tobytes(),
    "random.Random": lambda g: g.getstate(),
    "numpy.random._generator.Generator": lambda g: repr(g.bit_generator.state),
    "numpy.random.mtrand.RandomState": lambda g: repr(g.get_state(legacy=False)),
}


class Refused(tuple[str, Any, str]):
    """What tells a value that no state holds from another: what it is, its mark, and what to do instead."""

    __slots__ = ()


# -- kinds of values --------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A queue or a named tuple as a list, a kind of dictionary or a value of fields as a dictionary; others as they are."""
    kind = _AS_PLAIN.get(type(value))
    if kind is not None:
        return kind(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(value)
    fields = _fields(value)
    return value if fields is None else fields


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass or an attrs class of the user's own, by name; None for any other value."""
    kind = type(value)
    if isinstance(value, Mapping | nn.Module) or is_a_librarys(kind):
        return None
    if dataclasses.is_dataclass(kind):
        names = [f.name for f in dataclasses.fields(kind)]
    elif attrs.has(kind):
        names = [f.name for f in attrs.fields(kind)]
    else:
        return None
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def like(template: Any, items: Any) -> Any:
    """What ``plain`` gave, as a value like ``template``: its class, its length, its default."""
    if type(template) in _AS_PLAIN:
        new = copy.copy(template)
        new.clear()
        (new.extend if isinstance(new, deque) else new.update)(items)
        return new
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*items)
    if _fields(template) is None:
        return items
    new = copy.copy(template)
    for name, value in items.items():
        object.__setattr__(new, name, value)  # frozen ones refuse an assignment
    return new


def write(values: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Put a value in the place of an attribute; a container in place, for others may refer to the same one."""
    now: Any = values.get(name)
    if now is value or not isinstance(now, list | dict | deque) or not isinstance(value, type(now)):
        values[name] = value
        return
    now.clear()
    (now.update if isinstance(now, dict) else now.extend)(value)


# -- whether a value has changed --------------------------------------------------------------------------------------


def look_of(value: Any) -> tuple[Any, Any]:
    """A value, copied where it can change in place, and its mark; tensors are copied lazily."""
    look = mark(value)
    if look is OTHER or isinstance(look, Refused):
        return value, look
    return (like(value, map_tensors(_lazily, plain(value))) if _fields(value) is None else value), look


def _lazily(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None or tensor.is_inference():
        return tensor
    return lazy_clone(tensor).requires_grad_(tensor.requires_grad)


def copied(value: Any, memo: dict[int, Tensor]) -> Any:
    """A copy of a plain value that shares nothing with it; what was one tensor is one tensor in all copies of a memo."""

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return map_tensors(own, value)


def mark(value: Any) -> Any:
    """What tells a value from another, or from what it was before: equal marks, one value."""
    if isinstance(value, Tensor):
        hidden = isinstance(value, nn.Parameter)
        return OTHER if hidden else (id(value), None if value.is_inference() else value._version)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), repr(value)  # nan is nan, and 0.0 is not -0.0
    if _fields(value) is not None:  # what changes in it is looked at in itself
        return type(value), id(value)
    items = plain(value)
    return _mark_of_items(value, items) if type(items) in {list, tuple, dict} else _mark_of_refused(value)


def _mark_of_items(value: Any, items: Any) -> Any:
    """The mark of a container."""
    if len(items) > MOST_ITEMS:
        return OTHER
    pairs = items.items() if type(items) is dict else enumerate(items)
    marks = tuple([(key, mark(item)) for key, item in pairs])
    if any(one is OTHER for _, one in marks):
        return OTHER
    refused = next((one for _, one in marks if isinstance(one, Refused)), None)
    return (type(value), marks) if refused is None else Refused((refused[0], marks, refused[2]))


def _mark_of_refused(value: Any) -> Any:
    """The mark of a value that no state holds and that is seen to change; OTHER for any other value."""
    instead = "Keep numbers, lists, dictionaries or tensors there: they belong to the state."
    if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
        return Refused(("an array of NumPy", (value.shape, value.dtype.str, value.tobytes()), instead))
    if isinstance(value, set) and len(value) <= MOST_ITEMS:
        return Refused(("a set", frozenset(value), instead))
    if isinstance(value, Iterator) and type(value).__module__ in {"builtins", "itertools"}:
        frame = getattr(value, "gi_frame", None)
        at = (operator.length_hint(value, -1), frame and frame.f_lasti)
        return Refused(
            ("an iterator", (repr(value) if isinstance(value, itertools.count) else None, at), instead)
        )
    if (state_of := _GENERATORS.get(f"{type(value).__module__}.{type(value).__qualname__}")) is None:
        return OTHER
    instead = "Draw from torch's own generator (torch.rand), which is seeded from the state in every pass."
    return Refused(("a random generator", state_of(value), instead))


# -- whether a state can hold it --------------------------------------------------------------------------------------


def held(seen: tuple[Any, Any]) -> bool:
    """Whether a state can hold a value."""
    value, look = seen
    if look is OTHER or isinstance(look, Refused):
        return False
    return unkeepable(plain(value)) is None and not _has_graph(plain(value))


def lost(before: tuple[Any, Any] | None, now: tuple[Any, Any], first: Any) -> str | None:
    """What a state would lose of a value that has changed, or None: a result of the pass, or an entry of a cache.

    Args:
        before: the value and its mark before the pass; None if there was none.
        now: the value and its mark after it.
        first: the value before the pass, or anything that is none.
    """
    value, look = now
    if look is OTHER or _has_graph(plain(value)):
        return None
    if held(now):
        same = type(first) is type(value) or type(plain(value)) is type(value)
        return None if same else f"a {type(value).__name__} where there was none of its kind before"
    old = (
        dict(before[1][1])
        if before is not None and type(before[1]) is tuple and before[1][0] is look[0]
        else {}
    )
    if not any(key in old and old[key] != one for key, one in look[1]):
        return None  # a key more: a cache
    found = unkeepable(plain(value))
    return None if found is None else f"a {type(value).__name__} with a {type(found[1]).__name__} in it"


def _has_graph(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_graph, items))
