"""Values for a recipe's Config, given as text or as JSON: checked by name and type, with what to do about the rest."""

import difflib
import enum
import types
import typing
from collections.abc import Mapping, Sequence
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
            raise ConfigError(f"--set {name} is given twice, as {values[name]!r} and as {value!r}. Give it once.")
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


def _convert_number(value: Any, expected: type) -> Any:
    if isinstance(value, str):
        number = expected(value)  # ValueError for what is none
    elif isinstance(value, bool) or not isinstance(value, (int,) if expected is int else (int, float)):
        raise ValueError(value)
    else:
        number = expected(value)
    if number != number:  # noqa: PLR0124  (nan: no setting of a recipe means it)
        raise ValueError(value)
    return number


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = value.lower() if isinstance(value, str) else ""
    if text not in _TRUE | _FALSE:
        raise ValueError(value)
    return text in _TRUE


def _convert_sequence(value: Any, expected: Any) -> Any:
    args = get_args(expected)
    parts = [part for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)
    if get_origin(expected) is list:
        return [convert(part, args[0]) for part in parts]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(part, args[0]) for part in parts)
    return tuple(convert(part, kind) for part, kind in zip(parts, args, strict=True))


def convert(value: Any, expected: Any) -> Any:
    """A text from the command line, or a value from JSON, as the type that a field declares.

    Raises:
        ValueError: it is none of that type.
    """
    origin = get_origin(expected)
    if origin in {Union, types.UnionType}:
        for part in sorted(get_args(expected), key=lambda kind: kind is not type(None)):  # none first
            try:
                return convert(value, part)
            except ValueError:
                continue
        raise ValueError(value)
    if expected is type(None):
        if value is None or (isinstance(value, str) and value.lower() in _NONE):
            return None
        raise ValueError(value)
    if origin is Literal:
        return next(_only([c for c in get_args(expected) if c == value or str(c) == value]))
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return next(_only([member for member in expected if value in {member.name, member.value}]))
    if origin in {tuple, list}:
        return _convert_sequence(value, expected)
    if expected is bool:
        return _convert_bool(value)
    if expected in {int, float}:
        return _convert_number(value, expected)
    if expected in {str, Path}:
        if not isinstance(value, str):
            raise ValueError(value)
        return expected(value)
    if expected is Any:
        return value
    raise ValueError(value)


def _only(found: list[Any]) -> Any:
    if not found:
        raise ValueError
    return iter(found)


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
    """A Config as JSON holds it; ``configure(type(config), to_json(config))`` gives it back."""

    def plain(_: Any, __: Any, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.name
        return str(value) if isinstance(value, Path) else value

    return attrs.asdict(config, value_serializer=plain)
