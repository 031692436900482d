"""Plain values that Python reads besides state and batch, and that a graph has built in: a guard for those in reach.

These are the attributes of the model's modules and of the objects in reach of the train step, and the globals, closure
cells and defaults that its functions use. What lies further away is not seen: the clock, the environment, a file.
"""

import argparse
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steploop.core.trees import named_leaves
from steploop.errors import CompileError

__all__ = ["Baked"]

_LIBRARIES = frozenset(sys.stdlib_module_names - {"__main__"}) | {
    "torch",
    "torchvision",
    "steploop",
    "attr",
    "attrs",
    "numpy",
}
# what every module has: its tensors are the state's, its mode is set for each pass
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_DEEP = 4
_SILENT: dict[type, set[str]] = {nn.Linear: {"in_features", "out_features"}}  # only shown
_MISSING = object()


class _Cells(dict[str, Any]):
    """The closure of a function, by name."""

    def __init__(self, names: Iterable[str], cells: Iterable[types.CellType]) -> None:
        super().__init__()
        self._cells = dict(zip(names, cells, strict=True))

    def __getitem__(self, name: str) -> Any:
        try:
            return self._cells[name].cell_contents
        except ValueError:  # an empty one
            return _MISSING

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)


class _Place:
    """Some values of one mapping: attributes of an object, globals, a dictionary, the items of a list."""

    def __init__(self, where: Any, keys: Iterable[Any], name: Callable[[Any], str], *, whole: bool) -> None:
        self.where = where
        self.name = name
        self.whole = whole  # whether a new key would be seen by the code
        self.watch(keys)

    def watch(self, keys: Iterable[Any]) -> None:
        self.keys = tuple(keys)
        self.size = len(self.where) if self.whole else 0
        self._get = operator.itemgetter(*self.keys) if len(self.keys) > 1 else None
        self.known = tuple(map(self.value, self.keys))

    def value(self, key: Any) -> Any:
        try:
            return self.where[key]
        except (KeyError, IndexError):
            return _MISSING

    def unchanged(self) -> bool:
        if self.whole and len(self.where) != self.size:
            return False
        get = self._get
        try:
            now = tuple(map(self.value, self.keys)) if get is None else get(self.where)
        except (KeyError, IndexError):
            return False
        if all(map(operator.is_, now, self.known)):
            return True
        if not all(map(_same, now, self.known)):
            return False
        self.known = now
        return True

    def changes(self) -> list[tuple[Any, Any]]:
        """Keys that have another value now, with the old one."""
        found = [
            (k, old) for k, old in zip(self.keys, self.known, strict=True) if not _same(self.value(k), old)
        ]
        if self.whole and len(self.where) != self.size:
            keys = range(len(self.where)) if isinstance(self.where, list) else list(self.where)
            found += [(k, _MISSING) for k in keys if k not in self.keys and not _internal(self.where, k)]
        return found


def _internal(where: Any, key: Any) -> bool:
    return key in _OF_EVERY_MODULE and isinstance(where, dict)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are one, or plain and equal to the bit."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, (int, float, complex, str, bytes)):
        return repr(a) == repr(b)
    if isinstance(a, types.MethodType):
        return bool(a == b)
    return isinstance(a, tuple) and len(a) == len(b) and all(map(_same, a, b))


class Baked:
    """The plain values in reach of a train step and the models of its states, as they are now.

    Args:
        train_step: the function.
        models: of the states.
    """

    def __init__(self, train_step: Callable[..., Any], models: Sequence[nn.Module]) -> None:
        self._places: list[_Place] = []
        self._seen: dict[int, Any] = {}  # the objects themselves, so that no id comes twice
        for model in models:
            for path, module in model.named_modules():
                self._module(module, f"model.{path}".rstrip("."))
        self._hooks = [
            h for m in models for one in m.modules() for h in (one._forward_hooks, one._forward_pre_hooks)
        ]
        self._hook_counts = list(map(len, self._hooks))
        self._walk(train_step, "", 0)
        self._left: list[tuple[_Place, Any]] = []

    # -- what is in reach ------------------------------------------------------------------------------------------

    def _add(
        self, where: Any, keys: Iterable[Any], name: Callable[[Any], str], depth: int, *, whole: bool = False
    ) -> None:
        # what a library calls by this name is not given another meaning
        chosen = [k for k in keys if not (_is_library(where[k]) and getattr(where[k], "__name__", None) == k)]
        if chosen or whole:
            self._places.append(_Place(where, chosen, name, whole=whole))
        for key in chosen:
            self._walk(where[key], name(key), depth + 1)

    def _module(self, module: nn.Module, path: str) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        silent = _SILENT.get(type(module), set())
        values = vars(module)
        keys = [
            k for k in values if k not in _OF_EVERY_MODULE and k not in silent and k != "_steploop_machine"
        ]
        keys = [k for k in keys if not isinstance(values[k], nn.Module)]
        own = not _is_library(type(module))
        self._add(values, keys, lambda k: f"{path}.{k}", 0, whole=own)
        self._class(type(module), path)

    def _class(self, kind: type, path: str) -> None:
        """The functions of a class, and the plain values that stand in it."""
        for one in kind.__mro__:
            if _is_library(one) or id(one) in self._seen:
                continue
            self._seen[id(one)] = one
            values = vars(one)
            self._add(values, [k for k, v in values.items() if not k.startswith("__") and _is_plain(v)],
                      lambda k: f"{path}.{k}", 0)  # fmt: skip
            for value in list(values.values()):
                self._walk(
                    getattr(value, "__func__", value) if not isinstance(value, property) else value.fget,
                    path,
                    1,
                )

    def _walk(self, value: Any, name: str, depth: int) -> None:  # noqa: C901  (one branch for each kind)
        if depth > _MOST_DEEP or id(value) in self._seen or _is_plain(value) or isinstance(value, Tensor):
            return
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                self._module(module, f"{name}.{path}".strip("."))
            return
        if _is_library(value) and not isinstance(value, (partial, types.MethodType, dict, list)):
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            self._walk(value.__func__, name, depth)
            self._walk(value.__self__, name, depth)
        elif isinstance(value, partial):
            for part in (value.func, *value.args):
                self._walk(part, name, depth)
            self._walk(value.keywords, name, depth)
        elif isinstance(value, dict):
            self._add(value, list(value), lambda k: f"{name}[{k!r}]", depth, whole=True)
        elif isinstance(value, list):
            self._add(value, range(len(value)), lambda k: f"{name}[{k}]", depth, whole=True)
        elif isinstance(value, type):
            self._class(value, name)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._add(vars(value), list(vars(value)), lambda k: f"{name}.{k}".strip("."), depth, whole=True)
            self._class(type(value), name)

    def _function(self, function: Any, depth: int) -> None:
        names = set(_names(function.__code__))
        values = function.__globals__
        own = [k for k in names if k in values]
        self._add(values, [k for k in own if not isinstance(values[k], types.ModuleType)], str, depth)
        for module in (values[k] for k in own if isinstance(values[k], types.ModuleType)):
            if not _is_library(
                module
            ):  # config.temperature: the names of attributes are among the function's
                used = [k for k in names if k in vars(module)]
                self._add(vars(module), used, lambda k, m=module: f"{m.__name__}.{k}", depth)  # type: ignore[misc]
        if function.__closure__:
            cells = _Cells(function.__code__.co_freevars, function.__closure__)
            self._add(cells, list(cells), str, depth)
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._walk(part, function.__name__, depth + 1)

    # -- the guard -------------------------------------------------------------------------------------------------

    def unchanged(self) -> bool:
        """Whether all of them are as they were."""
        return list(map(len, self._hooks)) == self._hook_counts and all(
            [p.unchanged() for p in self._places]  # noqa: C419  (half the time of a generator)
        )

    def changed(self) -> list[str]:
        """The names of those that are not."""
        hooks = ["the hooks of a module"] if list(map(len, self._hooks)) != self._hook_counts else []
        return hooks + [place.name(key) for place in self._places for key, _ in place.changes()]

    # -- what a trace did ------------------------------------------------------------------------------------------

    def tensors_left(self) -> list[tuple[Any, Any, Any]]:
        """The tensors that a traced step has left in attributes: (mapping, key, value); it leaves them at every step."""
        found = []
        for place in self._places:
            for key, _ in place.changes():
                value = place.value(key)
                leaves = [leaf for _, leaf in named_leaves(value)]
                if not isinstance(place.where, list) and any(isinstance(leaf, Tensor) for leaf in leaves):
                    found.append((place.where, key, value))
                    self._left.append((place, key))
        return found

    def check(self, constants: list[Tensor]) -> None:
        """Refuse what the traced step has changed in Python: a graph would change it once.

        Raises:
            CompileError: names it.
        """
        read = {id(t) for t in constants}
        for place in self._places:
            for key, old in place.changes():
                if not any(p is place and k == key for p, k in self._left):
                    raise CompileError(
                        f"changes {place.name(key)} in Python, which a graph would do once. Keep it in the state (a buffer of the "
                        "module, state.carry), or change it outside of train_step."
                    )
                if any(id(leaf) in read for _, leaf in named_leaves(old)):
                    raise CompileError(
                        f"reads {place.name(key)} and puts another tensor there for the next step. Keep it in the state (a buffer of "
                        "the module, state.carry), or change the tensor in place."
                    )

    def put_back(self) -> None:
        """Undo what the trace has changed."""
        for place in self._places:
            for key, old in reversed(place.changes()):
                if old is _MISSING:
                    del place.where[key]
                else:
                    place.where[key] = old
        for place, key in self._left:
            if key in place.keys:
                place.watch([k for k in place.keys if k != key])
        self._left = []


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    )


def _is_library(value: Any) -> bool:
    """Whether a function, class, module or object is of a library: those are not looked into."""
    if _is_plain(value) or type(value) in {dict, list, set}:
        return False
    if isinstance(
        value,
        (Tensor, nn.Module, tuple, partial, types.MethodType, types.SimpleNamespace, argparse.Namespace),
    ):
        return False
    if isinstance(value, types.ModuleType):
        name, file = value.__name__, getattr(value, "__file__", "") or ""
    elif isinstance(value, (type, types.FunctionType)):
        name = getattr(value, "__module__", "") or ""
        file = getattr(sys.modules.get(name), "__file__", "") or ""
    else:
        name = type(value).__module__
        file = getattr(sys.modules.get(name), "__file__", "") or ""
    return name.partition(".")[0] in _LIBRARIES or "site-packages" in file
