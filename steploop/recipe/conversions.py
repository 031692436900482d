"""Convert texts of the command line and values of JSON to the types that a Config declares."""

import collections.abc
import enum
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

__all__ = ["convert", "describe_type", "fields_of"]

_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}
_SEQUENCES = (tuple, list, set, frozenset, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def describe_type(expected: Any) -> str:
    """A type as a person says it: ``float``, ``int or none``, ``one of auto, cifar10``, ``int,int,...``."""
    origin = get_origin(expected)
    if origin in {Union, types.UnionType}:
        return " or ".join(describe_type(part) for part in get_args(expected))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(expected))
    if origin in _SEQUENCES:
        part = describe_type(get_args(expected)[0]) if get_args(expected) else "value"
        return f"{part},{part},..."
    if origin in _MAPPINGS:
        key, value = map(describe_type, get_args(expected))
        return f'a JSON object of {key} to {value}, as in {{"a": ...}}'
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return "one of " + ", ".join(member.name for member in expected)
    short = {Path: "path", type(None): "none"}
    return short.get(expected) or str(getattr(expected, "__name__", expected))


class _UnfitError(ValueError):
    """A value is not of the type that a field declares."""


def _to_number(value: Any, expected: Any) -> Any:
    accepted = (str, int) if expected is int else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise _UnfitError
    number = expected(value)  # ValueError for a text that is none
    if number != number:  # noqa: PLR0124  (nan: no setting of a recipe means it)
        raise _UnfitError
    return number


def _to_bool(value: Any, _: Any) -> bool:
    text = str(value).lower() if isinstance(value, (bool, str)) else ""
    if text not in _TRUE | _FALSE:
        raise _UnfitError
    return text in _TRUE


def _to_none(value: Any, _: Any) -> None:
    if value is not None and str(value).lower() not in _NONE:
        raise _UnfitError


def _to_text(value: Any, expected: Any) -> Any:
    if not isinstance(value, (str, expected)):
        raise _UnfitError
    return expected(value)


def _to_choice(value: Any, expected: Any) -> Any:
    for choice in get_args(expected):
        if str(choice) == str(value):
            return choice
    raise _UnfitError


def _to_member(value: Any, expected: Any) -> Any:
    for member in expected:
        if value in (member, member.name, member.value):
            return member
    raise _UnfitError


def _to_sequence(value: Any, expected: Any) -> Any:
    """``int,int,...`` or a list as the declared collection; without declared parts, each as JSON reads it."""
    origin, kinds = get_origin(expected) or expected, get_args(expected)
    parts = _parts(value) if kinds or not isinstance(value, str) else [_as_json(p) for p in _parts(value)]
    if origin is tuple and kinds and Ellipsis not in kinds:
        return tuple(convert(part, kind) for part, kind in zip(parts, kinds, strict=True))
    made = tuple if origin is collections.abc.Sequence else origin
    return made(convert(part, kinds[0] if kinds else Any) for part in parts)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return (
            json.loads(value) if value.startswith("[") else [p.strip() for p in value.split(",") if p.strip()]
        )
    if isinstance(value, Mapping):
        raise _UnfitError
    return list(value)


def _as_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _to_mapping(value: Any, expected: Any) -> Any:
    """A JSON object, from the command line as its text."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise _UnfitError
    key, part = get_args(expected) or (Any, Any)
    return {convert(k, key): convert(v, part) for k, v in found.items()}


def _to_record(value: Any, expected: Any) -> Any:
    """An instance of an attrs class from the JSON object of its fields."""
    if isinstance(value, expected):
        return value
    found = json.loads(value) if isinstance(value, str) else value
    fields = fields_of(expected)
    if not isinstance(found, Mapping) or not found.keys() <= fields.keys():
        raise _UnfitError
    return expected(**{name: convert(part, fields[name][0]) for name, part in found.items()})


def _to_torch_value(value: Any, expected: Any) -> Any:
    """A dtype (``float32``) or a device (``cuda:1``) from its name."""
    import torch  # the field's type comes from it, so it is loaded

    if isinstance(value, expected):
        return value
    if not isinstance(value, str):
        raise _UnfitError
    if expected is torch.device:
        try:
            return torch.device(value)
        except RuntimeError:
            raise _UnfitError from None
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise _UnfitError
    return found


def _to_one_of(value: Any, expected: Any) -> Any:
    for kind in sorted(
        get_args(expected), key=lambda part: part is not type(None)
    ):  # none before a text "none"
        try:
            return convert(value, kind)
        except (TypeError, ValueError):
            continue
    raise _UnfitError


_BY_ORIGIN: dict[Any, Callable[[Any, Any], Any]] = {
    Union: _to_one_of, types.UnionType: _to_one_of, Literal: _to_choice,
    **dict.fromkeys(_SEQUENCES, _to_sequence), **dict.fromkeys(_MAPPINGS, _to_mapping),
}  # fmt: skip
_BY_TYPE: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _to_bool, int: _to_number, float: _to_number, str: _to_text, Path: _to_text, type(None): _to_none,
    Any: lambda value, _: value,
    **dict.fromkeys(_SEQUENCES, _to_sequence), **dict.fromkeys(_MAPPINGS, _to_mapping),
}  # fmt: skip


def convert(value: Any, expected: Any) -> Any:
    """A text from the command line, or a value from JSON, as the type that a field declares.

    Raises:
        ValueError: it does not have that type.
    """
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return _to_member(value, expected)
    if isinstance(expected, type) and attrs.has(expected):
        return _to_record(value, expected)
    if getattr(expected, "__module__", "") == "torch" and getattr(expected, "__name__", "") in {
        "dtype",
        "device",
    }:
        return _to_torch_value(value, expected)
    converter = _BY_ORIGIN.get(get_origin(expected)) or _BY_TYPE.get(expected)
    if converter is None:
        raise _UnfitError
    return converter(value, expected)


def fields_of(config_class: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of each field of an attrs class that its ``__init__`` takes."""
    hints = typing.get_type_hints(config_class)
    return {f.alias: (hints.get(f.name, Any), f.default) for f in attrs.fields(config_class) if f.init}
