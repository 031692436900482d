"""Find the plain values that Python may read besides state and batch: what is in reach of a train step and its models.

These are the attributes of the model's modules and of other objects in reach, and the globals, closure cells and
defaults that the functions in reach name. Of objects of the user's own only such attributes count as the code in reach
names. What lies further away is not seen: the clock, the environment, a file.
"""

import argparse
import copy
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from steploop.compilation.mapping_watch import Attributes, Cells, MappingWatch, Snapshot
from steploop.core.state.attribute_owners import hooks_of

__all__ = ["Found", "in_reach"]

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
_OF_PYTHON = frozenset({"builtins", "itertools"})  # whose iterators Python moves on
_MOST_DEEP = 4
_MOST_ITEMS = 100  # of a list or dictionary: a larger one holds data
_GENERATORS = (random.Random, np.random.RandomState, np.random.Generator)
_SILENT: dict[type, set[str]] = {nn.Linear: {"in_features", "out_features"}}  # only shown


@attrs.frozen(eq=False)
class Found:
    """What is in reach of a step.

    Attributes:
        values: that another part of the program may change.
        generators: of random numbers, which only their use changes.
        by_use: attributes that the code in reach does not name; if the step changes one, it does so by another way.
        iterators: the names of those that Python moves on as it reads them.
        put_back_only: what layers of torch keep for themselves.
    """

    values: list[MappingWatch] = attrs.field(factory=list)
    generators: list[MappingWatch] = attrs.field(factory=list)
    by_use: list[MappingWatch] = attrs.field(factory=list)
    iterators: list[str] = attrs.field(factory=list)
    put_back_only: list[MappingWatch] = attrs.field(factory=list)


def in_reach(train_step: Callable[..., Any], models: Sequence[nn.Module]) -> Found:
    """The values in reach of a train step and of the models of its states, by where they stand."""
    names: set[str] = set()
    while True:  # code that is found names further attributes
        walk = _Walk(frozenset(names))
        for model in models:
            for path, module in model.named_modules():
                walk.module(module, f"model.{path}".rstrip("."))
        walk.into(train_step, "", 0)
        if walk.named <= names:
            return walk.found
        names |= walk.named


class _Walk:
    """One walk through all that is in reach.

    Args:
        names: that the code in reach names: other attributes of the user's objects are not looked at.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.found = Found()
        self.named: set[str] = set()
        self._names = names
        self._seen: dict[int, Any] = {}  # the objects themselves, so that no id comes twice

    def _add(
        self, where: Any, keys: Iterable[Any], name: Callable[[Any], str], depth: int, *, whole: bool = False
    ) -> None:
        # what a library calls by this name is not given another meaning
        chosen = [k for k in keys if not (_is_library(where[k]) and getattr(where[k], "__name__", None) == k)]
        if chosen or whole:
            self.found.values.append(MappingWatch(where, chosen, name, whole=whole))
        for key in chosen:
            self.into(where[key], name(key), depth + 1)

    def module(self, module: nn.Module, path: str) -> None:
        """Look at a module, without its children."""
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        kind, values = type(module), vars(module)
        own = not _is_library(kind)
        silent = _SILENT.get(kind, set()) | _OF_EVERY_MODULE | {"_steploop_machine"}
        keys = [k for k, v in values.items() if k not in silent and not isinstance(v, nn.Module)]
        # a recurrent layer keeps its weights a second time
        private = [k for k in keys if k.startswith("_") and not (own and k in self._names)]
        self.found.put_back_only.append(MappingWatch(values, private, lambda k: f"{path}.{k}", whole=False))
        public = [k for k in keys if k not in private]
        named = [k for k in public if not own or k in self._names]
        self._add(values, named, lambda k: f"{path}.{k}", 0, whole=own)
        others = [k for k in public if k not in named]
        self.found.by_use.append(MappingWatch(values, others, lambda k: f"{path}.{k}", whole=False))
        self._class(kind, path)
        for hook in hooks_of(module):
            self.into(hook, f"{path}.hook", 1)

    def _class(self, kind: type, path: str) -> None:
        """The functions of a class that the code names, and the plain values that stand in it."""
        for one in kind.__mro__:
            if _is_library(one) or id(one) in self._seen:
                continue
            self._seen[id(one)] = one
            values = vars(one)
            named = [
                k
                for k in values
                if k in self._names or (k.startswith("__") and k != "__init__") or k == "forward"
            ]
            plain = [k for k in named if not k.startswith("__") and _is_plain(values[k])]
            self._add(Attributes(one), plain, lambda k: f"{path}.{k}", 0)
            for key in named:
                value = values[key]
                self.into(
                    value.fget if isinstance(value, property) else getattr(value, "__func__", value), path, 1
                )

    def into(self, value: Any, name: str, depth: int) -> None:  # noqa: C901, PLR0912  (one branch for each kind)
        """Look into a value."""
        if depth > _MOST_DEEP or id(value) in self._seen or _is_plain(value) or isinstance(value, Tensor):
            return
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                self.module(module, f"{name}.{path}".strip("."))
            return
        if isinstance(value, _GENERATORS):
            self._seen[id(value)] = value
            self.found.generators.append(
                MappingWatch(_state_of(value), ["state"], lambda _: name, whole=False)
            )
            return
        if isinstance(value, Iterator) and type(value).__module__ in _OF_PYTHON:
            self.found.iterators.append(name)
            return
        if _is_library(value) and not isinstance(value, (dict, deque)):
            return
        if isinstance(value, type):
            self._class(value, name)
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, types.MethodType):
            self.named.add(value.__func__.__name__)
            self.into(value.__func__, name, depth)
            self.into(value.__self__, name, depth)
        elif isinstance(value, partial):
            for part in (value.func, *value.args):
                self.into(part, name, depth)
            self.into(value.keywords, name, depth)
        elif isinstance(value, set):
            if len(value) <= _MOST_ITEMS:
                members = _members_of(value)
                self.found.values.append(MappingWatch(members, ["members"], lambda _: name, whole=False))
        elif isinstance(value, (dict, list, deque)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            if len(keys) <= _MOST_ITEMS:
                self._add(value, keys, lambda k: f"{name}[{k!r}]", depth, whole=True)
        elif isinstance(getattr(value, "__dict__", None), dict):
            own = [k for k in vars(value) if k in self._names]
            self._add(vars(value), own, lambda k: f"{name}.{k}".strip("."), depth)
            others = [k for k in vars(value) if k not in self._names]
            self.found.by_use.append(
                MappingWatch(vars(value), others, lambda k: f"{name}.{k}".strip("."), whole=False)
            )
            self._slots(value, name, depth)
            self._class(type(value), name)
        else:
            self._slots(value, name, depth)

    def _slots(self, value: Any, name: str, depth: int) -> None:
        """The attributes that an object keeps in slots."""
        kinds = [vars(one) for one in type(value).__mro__ if not _is_library(one)]
        slots = [k for kind in kinds for k, v in kind.items() if isinstance(v, types.MemberDescriptorType)]
        if own := [k for k in slots if k in self._names]:
            self._add(Attributes(value), own, lambda k: f"{name}.{k}".strip("."), depth)
            self._class(type(value), name)

    def _function(self, function: Any, depth: int) -> None:
        names = set(_names(function.__code__))
        self.named |= names
        attributes, itself = vars(function), function.__name__
        if attributes or itself in names or itself in function.__code__.co_freevars:
            self._add(attributes, list(attributes), lambda k: f"{itself}.{k}", depth, whole=True)
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
            cells = Cells(function.__code__.co_freevars, function.__closure__)
            self._add(cells, list(cells), str, depth)
        for part in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.into(part, function.__name__, depth + 1)


def _members_of(value: set[Any]) -> Snapshot:
    def write(old: Iterable[Any]) -> None:
        value.clear()
        value.update(old)

    return Snapshot(lambda: frozenset(value), write)


def _state_of(generator: Any) -> Snapshot:
    """The state of a random generator; what is written back is the state that it has now."""
    if isinstance(generator, random.Random):
        return Snapshot(generator.getstate, generator.setstate)
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        kept = copy.deepcopy(bits.state)
        return Snapshot(lambda: _exact(bits.state), lambda _: setattr(bits, "state", kept))
    kept = generator.get_state(legacy=False)
    return Snapshot(lambda: _exact(generator.get_state(legacy=False)), lambda _: generator.set_state(kept))


def _exact(state: Any) -> Any:
    """NumPy's nested dictionaries, as a text; an array's own text leaves most of it out."""
    if isinstance(state, dict):
        return repr({key: _exact(value) for key, value in state.items()})
    return state.tobytes() if isinstance(state, np.ndarray) else state


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of globals and attributes in a function and those inside of it; texts too, which getattr may take."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    )


def _is_library(value: Any) -> bool:
    """Whether a function, class, module or object is of a library: those are not looked into."""
    if _is_plain(value) or type(value) in {dict, list, set, deque}:
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
