"""Values for a recipe's Config, given as text or as JSON: checked by name and type, with what to do about the rest."""

import difflib
import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from steploop.errors import ConfigError

__all__ = ["configure", "convert", "describe_type", "fields_of", "nearest", "split_assignments", "to_json"]

_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a name that is not known: ``Did you mean lr?``, or the names there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."


def split_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """``["lr=0.1", "epochs=2"]`` as a mapping.

    Raises:
        ConfigError: one has no ``=``, or a name comes twice.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        name = name.strip()
        if not sign or not name:
            raise ConfigError(f"--set takes name=value, as in --set epochs=5, but got {assignment!r}.")
        if name in values:
            raise ConfigError(
                f"--set {name} is given twice, as {values[name]!r} and as {value!r}. Give it once."
            )
        values[name] = value
    return values


def describe_type(expected: Any) -> str:
    """A type as a person says it: ``float``, ``int or none``, ``one of auto, cifar10``, ``int,int,...``."""
    origin = get_origin(expected)
    if origin in {Union, types.UnionType}:
        return " or ".join(describe_type(part) for part in get_args(expected))
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(expected))
    if origin in {tuple, list}:
        part = describe_type(get_args(expected)[0]) if get_args(expected) else "value"
        return f"{part},{part},..."
    if expected is type(None):
        return "none"
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return "one of " + ", ".join(member.name for member in expected)
    return "path" if expected is Path else getattr(expected, "__name__", str(expected))


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
    if not isinstance(value, str):
        raise _UnfitError
    return expected(value)


def _to_choice(value: Any, expected: Any) -> Any:
    for choice in get_args(expected):
        if str(choice) == str(value):
            return choice
    raise _UnfitError


def _to_member(value: Any, expected: Any) -> Any:
    for member in expected:
        if value in {member.name, member.value}:
            return member
    raise _UnfitError


def _to_sequence(value: Any, expected: Any) -> Any:
    kinds = get_args(expected)
    parts = (
        [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
    )
    if get_origin(expected) is list:
        return [convert(part, kinds[0]) for part in parts]
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(convert(part, kinds[0]) for part in parts)
    return tuple(convert(part, kind) for part, kind in zip(parts, kinds, strict=True))


def _to_one_of(value: Any, expected: Any) -> Any:
    for kind in sorted(
        get_args(expected), key=lambda part: part is not type(None)
    ):  # none before a text "none"
        try:
            return convert(value, kind)
        except ValueError:
            continue
    raise _UnfitError


_BY_ORIGIN: dict[Any, Callable[[Any, Any], Any]] = {
    Union: _to_one_of, types.UnionType: _to_one_of, Literal: _to_choice, tuple: _to_sequence, list: _to_sequence,
}  # fmt: skip
_BY_TYPE: dict[Any, Callable[[Any, Any], Any]] = {
    bool: _to_bool, int: _to_number, float: _to_number, str: _to_text, Path: _to_text, type(None): _to_none,
    Any: lambda value, _: value,
}  # fmt: skip


def convert(value: Any, expected: Any) -> Any:
    """A text from the command line, or a value from JSON, as the type that a field declares.

    Raises:
        ValueError: it is none of that type.
    """
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return _to_member(value, expected)
    converter = _BY_ORIGIN.get(get_origin(expected)) or _BY_TYPE.get(expected)
    if converter is None:
        raise _UnfitError
    return converter(value, expected)


def fields_of(config_class: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, default) of an attrs class that takes part in ``__init__``."""
    hints = typing.get_type_hints(config_class)
    return {f.name: (hints.get(f.name, Any), f.default) for f in attrs.fields(config_class) if f.init}


def configure(config_class: type[Any], values: Mapping[str, Any], *, where: str = "Config") -> Any:
    """A Config with some fields set.

    Args:
        config_class: an attrs class whose fields all have defaults.
        values: field name -> text, or a value as JSON has it.
        where: whose Config it is, for messages.

    Raises:
        ConfigError: a name is not a field (the nearest is named), a value is not of its type, or Config refuses it.
    """
    fields = fields_of(config_class)
    for name in values:
        if name not in fields:
            raise ConfigError(f"{where} has no setting {name!r}. {nearest(name, list(fields))}")
    converted = {}
    for name, value in values.items():
        expected, default = fields[name]
        try:
            converted[name] = convert(value, expected)
        except ValueError:
            given = f"; its default is {default}" if default is not attrs.NOTHING else ""
            hint = ""
            if get_origin(expected) is Literal and isinstance(value, str):
                hint = f" {nearest(value, [str(choice) for choice in get_args(expected)])}"
            raise ConfigError(
                f"{where}: {name} must be {describe_type(expected)}, but got {value!r}{given}.{hint}"
            ) from None
    try:
        return config_class(**converted)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # the recipe's own validators
        raise ConfigError(f"{where}: {error}.") from error


def to_json(config: Any) -> dict[str, Any]:
    """A Config as JSON holds it, from which ``configure`` makes it again."""

    def plain(_: Any, __: Any, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.name
        return str(value) if isinstance(value, Path) else value

    return attrs.asdict(config, value_serializer=plain)
