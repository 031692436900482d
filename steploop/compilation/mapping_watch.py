"""Watch values of one mapping: whether each is still what it was, at 20 ns for each."""

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["MISSING", "Attributes", "Cells", "MappingWatch", "Snapshot"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
MISSING = object()


class Cells(dict[str, Any]):
    """The closure of a function, by name.

    Attributes:
        cells: name -> cell.
    """

    def __init__(self, names: Iterable[str], cells: Iterable[types.CellType]) -> None:
        super().__init__()
        self.cells = dict(zip(names, cells, strict=True))

    def __getitem__(self, name: str) -> Any:
        try:
            return self.cells[name].cell_contents
        except ValueError:  # an empty one
            return MISSING

    def __setitem__(self, name: str, value: Any) -> None:
        self.cells[name].cell_contents = value

    def __iter__(self) -> Iterator[str]:
        return iter(self.cells)


class Attributes:
    """The attributes of something that keeps them in no dictionary one may write to: a class, an object with slots.

    Args:
        owner: whose they are.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Any:
        """The attribute itself, of a class as it stands there."""
        if isinstance(self._owner, type):
            return vars(self._owner)[name]
        return getattr(self._owner, name, MISSING)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self._owner, name)


class Snapshot:
    """Something that is no mapping, as one with one key: a set, the state of a random generator.

    Args:
        read: gives a value of it that is compared.
        write: gives it that value.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self._read = read
        self._write = write

    def __getitem__(self, key: str) -> Any:
        """Its value."""
        return self._read()

    def __setitem__(self, key: str, value: Any) -> None:
        self._write(value)

    def __len__(self) -> int:
        return 1


class MappingWatch:
    """Some values of one mapping: attributes of an object, globals, a dictionary, the items of a list."""

    def __init__(self, where: Any, keys: Iterable[Any], name: Callable[[Any], str], *, whole: bool) -> None:
        self.where = where
        self.name = name
        self.whole = whole  # whether a new key would be seen by the code
        self.watch(keys)

    def watch(self, keys: Iterable[Any]) -> None:
        """Watch these keys, from their values of now on."""
        self.keys = tuple(keys)
        self.size = len(self.where) if self.whole else 0
        self.known = tuple(map(self.value, self.keys))

    def value(self, key: Any) -> Any:
        """The value of a key; MISSING where there is none."""
        try:
            return self.where[key]
        except (KeyError, IndexError):
            return MISSING

    def changes(self) -> list[tuple[Any, Any]]:
        """Keys that have another value now, with the old one."""
        found = [
            (k, old) for k, old in zip(self.keys, self.known, strict=True) if not same(self.value(k), old)
        ]
        if self.whole and len(self.where) != self.size:
            keys = range(len(self.where)) if isinstance(self.where, (list, deque)) else list(self.where)
            found += [(k, MISSING) for k in keys if k not in self.keys and not _internal(self.where, k)]
        return found


def _internal(where: Any, key: Any) -> bool:
    return key in _OF_EVERY_MODULE and isinstance(where, dict)


def same(a: Any, b: Any) -> bool:
    """Whether two values are one, or plain and equal to the bit."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, (int, float, complex, str, bytes)):
        return repr(a) == repr(b)
    if isinstance(a, (types.MethodType, frozenset, bytes)):
        return bool(a == b)
    return isinstance(a, tuple) and len(a) == len(b) and all(map(same, a, b))
