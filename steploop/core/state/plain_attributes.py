"""Plain attributes that a model changes while it computes: a hidden state, a count of passes, a temperature."""

import copy
import itertools
import operator
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from steploop.core.state.copying import lazy_clone
from steploop.core.trees import map_tensors, unkeepable
from steploop.errors import ConfigError

__all__ = ["PlainAttributes"]

_MISSING = object()  # the attribute was not there
_OTHER = object()  # a value that no state holds, and of which nobody can see whether it changes
_MOST_ITEMS = 1000  # a container that is larger is a table, not a value of the next step
_MOST_BYTES = 1 << 20  # the same for an array

# What every module has: parameters, buffers, layers, hooks, the mode.
_OF_TORCH = frozenset(vars(nn.Module()))

# containers that are held as a list or a dictionary
_AS_PLAIN: dict[type, type] = {deque: list, OrderedDict: dict, defaultdict: dict, Counter: dict}

# by their names: torch.compile around a step of ours cannot follow the classes
_GENERATORS: dict[str, Callable[[Any], Any]] = {
    "torch._C.Generator": lambda g: g.get_state().numpy().tobytes(),
    "random.Random": lambda g: g.getstate(),
    "numpy.random._generator.Generator": lambda g: repr(g.bit_generator.state),
    "numpy.random.mtrand.RandomState": lambda g: repr(g.get_state(legacy=False)),
}

# owner path -> attribute -> (value, what it looks like)
_Seen = dict[str, dict[str, tuple[Any, Any]]]


class _Refused(tuple[str, Any, str]):
    """What tells a value that no state holds from another: what it is, its mark, and what to do instead."""

    __slots__ = ()


class PlainAttributes:
    """The plain attributes of a model's layers that its passes change, held as values of the state.

    Which ones they are is looked at in the passes 1, 2, 4, 8, ...: so it costs nothing in the long run. From then on
    each is put into its module before a pass and read after it. Held are numbers, texts, tensors without a graph, and
    lists, tuples, queues and mappings of them; a tensor with a graph is a result of the pass (an auxiliary loss), which
    the next one does not read. Objects of the user's own that hang on a layer are looked into. A random generator, an
    array of NumPy or a set that changes is refused.

    Attributes:
        known: ``path.attribute`` -> its owner, its name, and its value before it changed for the first time.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        # what a module gives as its extra state it keeps itself
        keeps = nn.Module.get_extra_state
        own = {path: m for path, m in modules.items() if type(m).get_extra_state is keeps}
        classes = {kind for m in own.values() for kind in type(m).__mro__ if not _is_a_librarys(kind)}
        self._owners: dict[str, Any] = {
            **own,
            **_objects_on(own),
            **{f"class {k.__name__}": k for k in classes},
        }
        self._paths = frozenset(modules)
        self._passes = 0
        self.known: dict[str, tuple[Any, str, Any]] = {}

    def look(self) -> _Seen | None:
        """All attributes before a pass; None where this pass is not looked at."""
        self._passes += 1
        return None if self._passes & (self._passes - 1) else self.seen()

    def seen(self) -> _Seen:
        """All plain attributes as they are now."""
        return {path: _seen_in(module) for path, module in self._owners.items()}

    def learn(self, before: _Seen) -> None:
        """Know the attributes that have changed since ``before``.

        Raises:
            ConfigError: one of them is of a kind that no state holds.
        """
        for path, module in self._owners.items():
            old, now = before[path], _seen_in(module)
            for name in [name for name in now if name not in old or now[name][1] != old[name][1]]:
                key = f"{path}.{name}".removeprefix(".")
                if isinstance(look := now[name][1], _Refused):
                    what, _, instead = look
                    raise ConfigError(
                        f"The model changes {key}, {what}, in its forward pass. No state holds it, so that a copied or resumed run would "
                        f"compute something else. {instead}"
                    )
                if key not in self.known and _held(now[name]):
                    self.known[key] = (module, name, old.get(name, (_MISSING,))[0])

    def put_back(self, before: _Seen) -> None:
        """Undo what has changed since ``before``."""
        for path, module in self._owners.items():
            if isinstance(module, type):  # its change is refused
                continue
            old, now = before[path], _seen_in(module)
            for name in old.keys() | now.keys():
                if name not in old:
                    del module.__dict__[name]
                elif name not in now or now[name][1] != old[name][1]:
                    module.__dict__[name] = old[name][0]

    def values(self) -> dict[str, Any]:
        """Key -> a copy of each known attribute that is there and that a state can hold.

        Raises:
            ConfigError: one has grown too large to be copied in every pass.
        """
        found = {}
        for key, (owner, name, _) in self.known.items():
            value = owner.__dict__.get(name, _MISSING)
            if _held(_look_of(value)):
                found[key] = map_tensors(_own, _plain(value))
            elif isinstance(value, list | dict | deque) and len(value) > _MOST_ITEMS:
                raise ConfigError(
                    f"The model has put more than {_MOST_ITEMS} items into {key}, which belongs to the state and is copied in every pass. "
                    "Keep the last ones only (collections.deque(maxlen=...)), in a tensor, or outside of the model."
                )
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Give each known attribute a copy of its value; one that has none, what it was before it first changed."""
        for key, (owner, name, first) in self.known.items():
            value = values.get(key, first)
            if value is _MISSING:
                owner.__dict__.pop(name, None)
                continue
            value = map_tensors(_own, _plain(value))
            kinds = [k for k in (owner.__dict__.get(name), first) if type(k) in _AS_PLAIN]
            owner.__dict__[name] = _like(kinds[0], value) if kinds else value

    def is_one(self, key: str) -> bool:
        """Whether ``key`` may be a plain attribute of one of the layers."""
        path, _, name = key.rpartition(".")
        module = self._owners.get(path)
        return (
            module is not None
            and name.isidentifier()
            and name not in _OF_TORCH
            and key not in self._paths
            and _mark(getattr(type(module), name, None)) is not _OTHER  # no method, no property
        )

    def know(self, keys: Iterable[str]) -> None:
        """Know the attributes that a checkpoint holds."""
        for key in keys:
            path, _, name = key.rpartition(".")
            if key not in self.known and self.is_one(key):
                module = self._owners[path]
                self.known[key] = (module, name, module.__dict__.get(name, _MISSING))


def _objects_on(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The objects of the user's own that hang on layers, each under the first path that leads to it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, value in module.__dict__.items():
            if name not in _OF_TORCH and id(value) not in seen and _is_users(value):
                seen.add(id(value))
                found[f"{path}.{name}".removeprefix(".")] = value
    return found


def _is_users(value: Any) -> bool:
    """Whether a value is an object with attributes, of no class of a library that keeps to itself."""
    if isinstance(value, nn.Module | Tensor | type) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value.__dict__, dict) and not _is_a_librarys(type(value))


def _is_a_librarys(kind: type) -> bool:
    package = kind.__module__.partition(".")[0]
    known = package in sys.stdlib_module_names and package not in {"__main__", "types", "argparse"}
    return known or package in {"torch", "numpy", "steploop"}


def _seen_in(owner: Any) -> dict[str, tuple[Any, Any]]:
    # a text in an object is a setting: a library writes what it has chosen into its configuration
    texts = isinstance(owner, nn.Module)
    if isinstance(owner, type):
        instead = "Keep it in the module itself (self.x in the place of type(self).x): then it belongs to the state."
        counts = {n: v for n, v in owner.__dict__.items() if type(v) in {int, float} or isinstance(v, Tensor)}
        what = "a value that all modules of the class share"  # a flag or a table may be a cache
        return {name: (None, _Refused((what, _mark(value), instead))) for name, value in counts.items()}
    return {
        name: _look_of(value)
        for name, value in owner.__dict__.items()
        if name not in _OF_TORCH and not isinstance(value, nn.Module) and (texts or type(value) is not str)
    }


def _plain(value: Any) -> Any:
    """A queue as a list, a kind of dictionary as a dictionary; anything else as it is."""
    kind = _AS_PLAIN.get(type(value))
    return value if kind is None else kind(value)


def _like(original: Any, plain: Any) -> Any:
    """The items of ``plain`` in a container like ``original``: its length, its default."""
    new = copy.copy(original)
    new.clear()
    (new.extend if isinstance(new, deque) else new.update)(plain)
    return new


def _look_of(value: Any) -> tuple[Any, Any]:
    """A value, copied where it can change in place, and what tells it from another; tensors are copied lazily."""
    look = _mark(value)
    if look is _OTHER or isinstance(look, _Refused):
        return value, look
    copied = map_tensors(_copied, _plain(value))
    return (_like(value, copied) if type(value) in _AS_PLAIN else copied), look


def _copied(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None or tensor.is_inference():
        return tensor
    return lazy_clone(tensor).requires_grad_(tensor.requires_grad)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        hidden = isinstance(value, nn.Parameter)
        return _OTHER if hidden else (id(value), None if value.is_inference() else value._version)
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), repr(value)  # nan is nan, and 0.0 is not -0.0
    plain = _plain(value)
    if type(plain) not in {list, tuple, dict}:
        return _mark_of_refused(value)
    items = plain.items() if type(plain) is dict else enumerate(plain)
    marks = [(key, _mark(item)) for key, item in items] if len(plain) <= _MOST_ITEMS else [(0, _OTHER)]
    unmarked = any(mark is _OTHER or isinstance(mark, _Refused) for _, mark in marks)
    return _OTHER if unmarked else (type(plain), tuple(marks))


def _mark_of_refused(value: Any) -> Any:
    """The mark of a value that no state holds and that is seen to change; _OTHER for any other value."""
    instead = "Keep numbers, lists, dictionaries or tensors there: they belong to the state."
    if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
        return _Refused(("an array of NumPy", (value.shape, value.dtype.str, value.tobytes()), instead))
    if isinstance(value, set) and len(value) <= _MOST_ITEMS:
        return _Refused(("a set", frozenset(value), instead))
    if isinstance(value, Iterator) and type(value).__module__ in {"builtins", "itertools"}:
        frame = getattr(value, "gi_frame", None)
        at = (operator.length_hint(value, -1), frame and frame.f_lasti)
        return _Refused(
            ("an iterator", (repr(value) if isinstance(value, itertools.count) else None, at), instead)
        )
    if (state_of := _GENERATORS.get(f"{type(value).__module__}.{type(value).__qualname__}")) is None:
        return _OTHER
    instead = "Draw from torch's own generator (torch.rand), which is seeded from the state in every pass."
    return _Refused(("a random generator", state_of(value), instead))


def _held(seen: tuple[Any, Any]) -> bool:
    """Whether a state can hold a value."""
    value, look = seen
    if look is _OTHER or isinstance(look, _Refused) or value is _MISSING:
        return False
    return unkeepable(_plain(value)) is None and not _has_graph(_plain(value))


def _has_graph(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_graph, items))
