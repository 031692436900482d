"""Plain attributes that a model changes while it computes: a hidden state, a count of passes, a temperature."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from steploop.core.state.copying import lazy_clone
from steploop.core.trees import map_tensors, unkeepable

__all__ = ["PlainAttributes"]

_MISSING = object()  # the attribute was not there
_OTHER = object()  # a value that no state holds
_MOST_ITEMS = 1000  # a container that is larger is a table, not a value of the next step

# What every module has: parameters, buffers, layers, hooks, the mode.
_OF_TORCH = frozenset(vars(nn.Module()))

# module path -> attribute -> (value, what it looks like)
_Seen = dict[str, dict[str, tuple[Any, Any]]]


class PlainAttributes:
    """The plain attributes of a model's layers that its passes change, held as values of the state.

    Which ones they are is looked at in the passes 1, 2, 4, 8, ...: so it costs nothing in the long run. From then on
    each is put into its module before a pass and read after it. Held are numbers, texts, tensors without a graph, and
    lists, tuples and mappings of them; a tensor with a graph is a result of the pass (an auxiliary loss), which the next
    one does not read.

    Attributes:
        known: ``path.attribute`` -> its module, its name, and its value before it changed for the first time.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        # what a module gives as its extra state it keeps itself
        keeps = nn.Module.get_extra_state
        self._modules = {path: m for path, m in modules.items() if type(m).get_extra_state is keeps}
        self._paths = frozenset(modules)
        self._passes = 0
        self.known: dict[str, tuple[nn.Module, str, Any]] = {}

    def look(self) -> _Seen | None:
        """All attributes before a pass; None where this pass is not looked at."""
        self._passes += 1
        return None if self._passes & (self._passes - 1) else self.seen()

    def seen(self) -> _Seen:
        """All plain attributes as they are now."""
        return {path: _seen_in(module) for path, module in self._modules.items()}

    def learn(self, before: _Seen) -> None:
        """Know the attributes that have changed since ``before``."""
        for path, module in self._modules.items():
            old, now = before[path], _seen_in(module)
            for name in [name for name in now if name not in old or now[name][1] != old[name][1]]:
                key = f"{path}.{name}".removeprefix(".")
                if key not in self.known and _held(now[name]):
                    self.known[key] = (module, name, old.get(name, (_MISSING,))[0])

    def put_back(self, before: _Seen) -> None:
        """Undo what has changed since ``before``."""
        for path, module in self._modules.items():
            old, now = before[path], _seen_in(module)
            for name in old.keys() | now.keys():
                if name not in old:
                    del module.__dict__[name]
                elif name not in now or now[name][1] != old[name][1]:
                    module.__dict__[name] = old[name][0]

    def values(self) -> dict[str, Any]:
        """Key -> a copy of each known attribute that is there and that a state can hold."""
        return {
            key: map_tensors(_own, module.__dict__[name])
            for key, (module, name, _) in self.known.items()
            if name in module.__dict__ and _held(_look_of(module.__dict__[name]))
        }

    def put(self, values: Mapping[str, Any]) -> None:
        """Give each known attribute a copy of its value; one that has none, what it was before it first changed."""
        for key, (module, name, first) in self.known.items():
            value = values.get(key, first)
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = map_tensors(_own, value)

    def is_one(self, key: str) -> bool:
        """Whether ``key`` may be a plain attribute of one of the layers."""
        path, _, name = key.rpartition(".")
        module = self._modules.get(path)
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
                module = self._modules[path]
                self.known[key] = (module, name, module.__dict__.get(name, _MISSING))


def _seen_in(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {
        name: _look_of(value)
        for name, value in module.__dict__.items()
        if name not in _OF_TORCH and not isinstance(value, nn.Module)
    }


def _look_of(value: Any) -> tuple[Any, Any]:
    """A value, copied where it can change in place, and what tells it from another; tensors are copied lazily."""
    look = _mark(value)
    return (value, look) if look is _OTHER else (map_tensors(_copied, value), look)


def _copied(tensor: Tensor) -> Tensor:
    if tensor.grad_fn is not None or tensor.is_inference():
        return tensor
    return lazy_clone(tensor).requires_grad_(tensor.requires_grad)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _mark(value: Any) -> Any:
    if isinstance(value, Tensor):
        if isinstance(value, nn.Parameter):
            return _OTHER
        return id(value), None if value.is_inference() else value._version
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), repr(value)  # nan is nan, and 0.0 is not -0.0
    if type(value) not in {list, tuple, dict} or len(value) > _MOST_ITEMS:
        return _OTHER
    items = value.items() if type(value) is dict else enumerate(value)
    marks = [(key, _mark(item)) for key, item in items]
    return _OTHER if any(mark is _OTHER for _, mark in marks) else (type(value), tuple(marks))


def _held(seen: tuple[Any, Any]) -> bool:
    """Whether a state can hold a value."""
    value, look = seen
    return look is not _OTHER and unkeepable(value) is None and not _has_graph(value)


def _has_graph(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.grad_fn is not None
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_graph, items))
