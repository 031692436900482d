"""Make a recipe's Config from texts or JSON, check it by name and type, and write it as JSON."""

import difflib
import enum
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs

from steploop.errors import ConfigError
from steploop.recipe.conversions import convert, describe_type, fields_of

__all__ = [
    "configure",
    "convert",
    "describe_type",
    "fields_of",
    "nearest",
    "refuse_unrecordable",
    "settled_paths",
    "split_assignments",
    "to_json",
]


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a name that is not known: ``Did you mean lr?``, or the names there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known) or 'none'}."


def split_assignments(assignments: Sequence[str], *, option: str = "--set") -> dict[str, str]:
    """``["lr=0.1", "epochs=2"]`` as a mapping.

    Raises:
        ConfigError: one has no ``=``, or a name comes twice.
    """
    values: dict[str, str] = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        name = name.strip()
        if not sign or not (name or option != "--set"):
            example = "epochs=5" if option == "--set" else "backbone=encoder"
            raise ConfigError(f"{option} takes name=value, as in {option} {example}, but got {assignment!r}.")
        if name in values:
            raise ConfigError(
                f"{option} {name} is given twice, as {values[name]!r} and as {value!r}. Give it once."
            )
        values[name] = value
    return values


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
        except (TypeError, ValueError):
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
    found: dict[str, Any] = _plain(config)
    return found


def _plain(value: Any) -> Any:
    """A value of a Config as JSON has it; what JSON lacks becomes the text that ``convert`` reads."""
    if attrs.has(type(value)):
        return {f.alias: _plain(getattr(value, f.name)) for f in attrs.fields(type(value)) if f.init}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_plain(part) for part in value]
        return parts if isinstance(value, (list, tuple)) else sorted(parts, key=repr)
    if isinstance(value, enum.Enum):
        return value.name
    as_it_is = value is None or isinstance(value, (bool, int, str))
    if as_it_is or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value).removeprefix("torch.")  # a path, a dtype, a device, inf


def refuse_unrecordable(config: Any, *, where: str) -> None:
    """Refuse a Config that a resume could not read back from config.json.

    Raises:
        ConfigError: a field does not survive being written and read; it is named.
    """
    fields = fields_of(type(config))
    for field in attrs.fields(type(config)):
        if not field.init:
            continue
        name, value = field.alias, getattr(config, field.name)
        expected = fields[name][0]
        try:
            text = json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)
            text.encode("utf-8", "surrogateescape").decode()  # bytes of a file's name that are not UTF-8
            again = convert(json.loads(text), expected)
            survives = bool(again == value)
        except Exception:  # noqa: BLE001  (the value's own class may raise anything)
            survives = False
        if not survives:
            raise ConfigError(
                f"{where}: {name}={value!r} cannot be written to config.json and read back as {describe_type(expected)}, "
                "and a resume would go on with another value. Declare its type (tuple[int, ...], dict[str, float], an "
                "attrs class, an Enum), or build it from plain settings in build()."
            )


def settled_paths(config: Any, names: Iterable[str]) -> Any:
    """The Config with each relative path among some fields made absolute: a resume from elsewhere means the same.

    Paths are fields that hold a ``Path``, and a text in a field called ``root``; an empty text stays, and names no folder.
    """
    chosen = {*names}
    found = {}
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        named_root = field.name == "root" and isinstance(value, str) and value and "://" not in value
        if field.init and field.alias in chosen and (named_root or isinstance(value, Path)):
            settled = os.path.abspath(Path(value).expanduser())  # noqa: PTH100  (links stay as they are named)
            found[field.alias] = type(value)(settled)
    return attrs.evolve(config, **found) if found else config
