"""Plain attributes that a model changes while it computes: a hidden state, a count of passes, a temperature."""

import types
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from steploop.core.state.attribute_marks import (
    OTHER,
    Refused,
    copied,
    held,
    like,
    look_of,
    lost,
    mark,
    plain,
    write,
)
from steploop.core.state.attribute_owners import MOST_ITEMS, OF_TORCH, is_a_librarys, objects_on, values_of
from steploop.errors import ConfigError

__all__ = ["PlainAttributes"]

_MISSING = object()  # the attribute was not there

# owner path -> attribute -> (value, what it looks like)
_Seen = dict[str, dict[str, tuple[Any, Any]]]


class PlainAttributes:
    """The plain attributes of a model's layers that its passes change, held as values of the state.

    Which ones they are is looked at in the passes 1, 2, 4, 8, ...: so it costs nothing in the long run. From then on
    each is put into its module before a pass and read after it. Held are numbers, texts, tensors without a graph, and
    lists, tuples, queues and mappings of them; a tensor with a graph is a result of the pass (an auxiliary loss), which
    the next one does not read. Objects of the user's own that hang on a layer, or on another such object, or are a hook,
    are looked into. A random generator, an array of NumPy or a set that changes is refused.

    Attributes:
        known: ``path.attribute`` -> its owner, its name, and its value before it changed for the first time.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        # what a module gives as its extra state it keeps itself
        keeps = nn.Module.get_extra_state
        own = {path: m for path, m in modules.items() if type(m).get_extra_state is keeps}
        classes = {kind for m in own.values() for kind in type(m).__mro__ if not is_a_librarys(kind)}
        self._owners: dict[str, Any] = {
            **own,
            **objects_on(own),
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

    def learn(self, before: _Seen, during: str = "in its forward pass") -> bool:
        """Know the attributes that have changed since ``before``; whether there was one that a state holds.

        Raises:
            ConfigError: one of them is of a kind that no state holds.
        """
        any_held = False
        for path, owner in self._owners.items():
            old, now = before[path], _seen_in(owner)
            for name in [name for name in now if name not in old or now[name][1] != old[name][1]]:
                key = f"{path}.{name}".removeprefix(".")
                look, first = now[name][1], old.get(name, (_MISSING,))[0]
                if isinstance(look, Refused):
                    raise _lost(key, look[0], during, look[2])
                if key not in self.known and (what := lost(old.get(name), now[name], first)) is not None:
                    instead = (
                        "Make it in __init__, of numbers, texts, tensors, and lists and dictionaries of them."
                    )
                    raise _lost(key, what, during, instead)
                if held(now[name]):
                    any_held = True
                    self.known.setdefault(key, (owner, name, first))
        return any_held

    def put_back(self, before: _Seen) -> None:
        """Undo what has changed since ``before``."""
        for path, owner in self._owners.items():
            if isinstance(owner, type):  # its change is refused
                continue
            old, now, values = before[path], _seen_in(owner), values_of(owner)
            for name in old.keys() | now.keys():
                if name not in old:
                    del values[name]
                elif name not in now or now[name][1] != old[name][1]:
                    write(values, name, old[name][0])

    def values(self) -> dict[str, Any]:
        """Key -> a copy of each known attribute that is there and that a state can hold.

        Raises:
            ConfigError: one has grown too large to be copied in every pass.
        """
        found: dict[str, Any] = {}
        memo: dict[int, Tensor] = {}
        for key, (owner, name, _) in self.known.items():
            value = values_of(owner).get(name, _MISSING)
            if value is not _MISSING and held((value, mark(value))):
                found[key] = copied(plain(value), memo)
            elif isinstance(value, list | dict | deque) and len(value) > MOST_ITEMS:
                raise ConfigError(
                    f"The model has put more than {MOST_ITEMS} items into {key}, which belongs to the state and is copied in every pass. "
                    "Keep the last ones only (collections.deque(maxlen=...)), in a tensor, or outside of the model."
                )
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Give each known attribute a copy of its value; one that has none, what it was before it first changed."""
        memo: dict[int, Tensor] = {}
        for key, (owner, name, first) in self.known.items():
            where = values_of(owner)
            if (value := values.get(key, first)) is _MISSING:
                where.pop(name, None)
                continue
            value = copied(plain(value), memo)
            template = next((t for t in (where.get(name), first) if type(plain(t)) is not type(t)), None)
            write(where, name, value if template is None else like(template, value))

    def is_one(self, key: str) -> bool:
        """Whether ``key`` may be a plain attribute of one of the layers."""
        path, _, name = key.rpartition(".")
        owner = self._owners.get(path)
        if owner is None or not name.isidentifier() or name in OF_TORCH or key in self._paths:
            return False
        of_class = getattr(type(owner), name, None)
        # no method, no property
        return isinstance(of_class, types.MemberDescriptorType) or mark(of_class) is not OTHER

    def know(self, keys: Iterable[str]) -> None:
        """Know the attributes that a checkpoint holds."""
        for key in keys:
            path, _, name = key.rpartition(".")
            if key not in self.known and self.is_one(key):
                owner = self._owners[path]
                self.known[key] = (owner, name, values_of(owner).get(name, _MISSING))


def _lost(key: str, what: str, during: str, instead: str) -> ConfigError:
    return ConfigError(
        f"The model changes {key}, {what}, {during}. No state holds it, so that a copied or resumed run would "
        f"compute something else. {instead}"
    )


def _seen_in(owner: Any) -> dict[str, tuple[Any, Any]]:
    # a text in an object is a setting: a library writes what it has chosen into its configuration
    texts = isinstance(owner, nn.Module)
    if isinstance(owner, type):
        instead = "Keep it in the module itself (self.x in the place of type(self).x): then it belongs to the state."
        counts = {n: v for n, v in owner.__dict__.items() if type(v) in {int, float} or isinstance(v, Tensor)}
        what = "a value that all modules of the class share"  # a flag or a table may be a cache
        return {name: (None, Refused((what, mark(value), instead))) for name, value in counts.items()}
    return {
        name: look_of(value)
        for name, value in values_of(owner).items()
        if name not in OF_TORCH and not isinstance(value, nn.Module) and (texts or type(value) is not str)
    }
