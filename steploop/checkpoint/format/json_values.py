"""Store plain values as strict JSON, and read them back exactly.

JSON has no tuple, no key but text, no nan and no tensor, and Python's reader takes more than JSON (nan, duplicate
keys, 1e999, UTF-16). Here a value that JSON lacks is an object with one key, which says what it is:

    {"tuple": [...]}   {"dict": [[key, value], ...]}   {"float": "nan"}   {"tensor": "its name in the file"}

Nothing that is read names code: values become None, bool, int, float, str, list, tuple, dict or a tensor.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from torch import Tensor

from steploop.errors import CheckpointDamagedError, CheckpointUnsupportedError

__all__ = ["check_json", "decode", "encode", "read_json", "write_json"]

MAX_DEPTH: Final = 32
MAX_INT: Final = 1 << 64  # a seed may use all 64 bits; Python reads longer numbers ever more slowly
_MOST_DIGITS: Final = 21
_TOO_DEEP: Final = f"it is nested more than {MAX_DEPTH} levels deep"
_SPECIAL: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON; put its tensors into ``tensors``, under their dotted names.

    Args:
        value: None, bool, int, float, str, a tensor, or lists, tuples and mappings of them.
        name: its dotted name, which messages and tensors bear.
        tensors: receives the tensors.

    Raises:
        CheckpointUnsupportedError: it holds something else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if type(value) is int:
        if abs(value) >= MAX_INT:
            raise CheckpointUnsupportedError(
                f"{name} is {value}, but a checkpoint holds whole numbers below 2**64."
            )
        return value
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        while name in tensors:  # dots in keys can make two names one
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if type(value) in {list, tuple}:
        items = [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = [[encode(k, name, tensors), encode(v, f"{name}.{k}", tensors)] for k, v in value.items()]
        return {"dict": pairs}
    raise CheckpointUnsupportedError(
        f"{name} is a {type(value).__name__} ({str(value)[:80]}), but a checkpoint holds None, bool, int, float, str, "
        "tensors, and lists, tuples and mappings of them."
    )


def decode(value: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the value that ``encode`` stored; messages call it ``name``.

    Raises:
        CheckpointDamagedError: ``encode`` writes no such value.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "tuple" and isinstance(content, list):
            return tuple(decode(item, f"{name}.{i}", tensors) for i, item in enumerate(content))
        if kind == "float" and isinstance(content, str) and content in _SPECIAL:
            return _SPECIAL[content]
        if kind == "tensor" and isinstance(content, str) and content in tensors:
            return tensors[content]
        if (
            kind == "dict"
            and isinstance(content, list)
            and all(isinstance(p, list) and len(p) == 2 for p in content)
        ):
            return {_key(k, name): decode(v, f"{name}.{k}", tensors) for k, v in content}
    raise CheckpointDamagedError(f"{name} holds {str(value)[:80]!r}, which steploop never writes.")


def _key(key: Any, name: str) -> Any:
    if key is not None and not isinstance(key, (bool, int, float, str)):
        raise CheckpointDamagedError(f"{name} has the key {str(key)[:80]!r}, which steploop never writes.")
    return key


def write_json(values: Mapping[str, Any]) -> bytes:
    """Write JSON in its one form: keys sorted, ASCII, one line for each outermost key."""

    def compact(value: Any) -> str:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))

    lines = ",\n".join(f"{compact(key)}: {compact(values[key])}" for key in sorted(values))
    return f"{{\n{lines}\n}}\n".encode()


def check_json(values: Mapping[str, Any]) -> None:
    """Check that ``values`` can be read back, before anything is written.

    Raises:
        CheckpointUnsupportedError: a text in it is not Unicode, or it is nested too deeply.
    """
    text = write_json(values)
    try:
        read_json(text, "the state", limit=len(text))
    except CheckpointDamagedError as error:
        raise CheckpointUnsupportedError(
            f"The state cannot be read back from a checkpoint: {error}"
        ) from error


def read_json(text: bytes, name: str, *, limit: int) -> dict[str, Any]:
    """Read a JSON object strictly.

    Args:
        text: the file's bytes.
        name: what messages call it.
        limit: more bytes than these are refused unread.

    Raises:
        CheckpointDamagedError: it is longer, not UTF-8, not JSON, no object, has a key twice, a number that is not
            finite or not below 2**64, half a character, or more than 32 levels.
    """
    try:
        values = _parsed(text, limit)
    except RecursionError:
        problem = _TOO_DEEP
    except ValueError as error:
        problem = str(error)[:200]
    else:
        return values
    raise CheckpointDamagedError(f"{name} is not the JSON that steploop writes: {problem}.")


def _parsed(text: bytes, limit: int) -> dict[str, Any]:
    """Parse an object; ValueError for what only Python's reader accepts, such as NaN."""
    if len(text) > limit:
        raise ValueError(f"it has {len(text)} bytes, and at most {limit} are read")
    values = json.loads(
        text.decode(),
        object_pairs_hook=_unique,
        parse_int=_whole,
        parse_float=_finite,
        parse_constant=_no_constant,
    )
    if not isinstance(values, dict):
        raise ValueError("the outermost value is not an object")  # noqa: TRY004  (every refusal here is a ValueError)
    if _depth_exceeds(values, MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    if b"\\u" in text:
        json.dumps(
            values, ensure_ascii=False
        ).encode()  # half a surrogate pair has no UTF-8: UnicodeEncodeError
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS or abs(int(digits)) >= MAX_INT:
        raise ValueError(f"the number {digits[:30]} has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:30]} is not finite")
    return number


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _depth_exceeds(values: Any, limit: int) -> bool:
    """Whether something is nested deeper than ``limit``; without recursion."""
    level = [values]
    for _ in range(limit):
        below = [v.values() if isinstance(v, dict) else v for v in level]
        level = [child for children in below for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return True
