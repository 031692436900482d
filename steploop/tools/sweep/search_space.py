"""Read the settings of a sweep: alternatives (``0.1,0.3``) or a range (``1e-4..1e-1:log``), checked by Config."""

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from steploop.errors import ConfigError
from steploop.recipe.config_values import configure, fields_of, nearest, to_json

__all__ = ["Choices", "Setting", "Span", "grouped", "read_seeds", "read_space"]

_SPAN = re.compile(r"([^,]+?)\.\.([^,]+?)(:log)?")
_MOST_CHOICES = 10_000


@attrs.frozen
class Choices:
    """Values that are tried one by one.

    Attributes:
        values: as JSON has them; at least one, no two the same.
    """

    values: tuple[Any, ...]


@attrs.frozen
class Span:
    """All numbers from ``low`` to ``high``, both included.

    Attributes:
        log: whether their logarithm is drawn evenly.
        whole: whether only whole numbers are drawn.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


Setting = Choices | Span


def grouped(assignments: Sequence[str]) -> dict[str, list[str]]:
    """``["lr=0.1,0.3", "widths=8", "widths=8,8"]`` as name -> texts.

    Raises:
        ConfigError: one has no ``=``.
    """
    found: dict[str, list[str]] = {}
    for assignment in assignments:
        name, sign, text = assignment.partition("=")
        if not sign or not name.strip():
            raise ConfigError(
                f"--set takes name=values, as in --set learning_rate=0.01,0.1, but got {assignment!r}."
            )
        found.setdefault(name.strip(), []).append(text)
    return found


def read_seeds(given: str | int | Iterable[int] | None) -> tuple[int, ...]:
    """The seeds of a sweep: a number n means 0 to n - 1, ``3,5`` these two; none for None.

    Raises:
        ConfigError: they are not whole numbers from 0 on, or one comes twice.
    """
    if given is None:
        return ()
    try:
        parts = (
            given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else [*given]
        )
        numbers = tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        numbers = (-1,)
    if len(numbers) == 1 and not isinstance(given, (list, tuple, range)):
        numbers = tuple(range(min(numbers[0], _MOST_CHOICES + 1)))
    if not 1 <= len(numbers) <= _MOST_CHOICES or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"seeds must be how many (4 means the seeds 0 to 3), or different whole numbers such as 3,5, but got {given!r}."
        )
    return numbers


def read_space(config_class: type[Any], given: Mapping[str, Any], *, where: str) -> dict[str, Setting]:
    """Name -> what is tried, in the order given.

    Args:
        config_class: the recipe's Config.
        given: name -> a text or several, as on the command line; or, from Python, a value or a list of values.
        where: whose Config it is, for messages.

    Raises:
        ConfigError: a name is not a setting, a value is not of its type, or comes twice; a range is empty.
    """
    fields = fields_of(config_class)
    for name in given:
        if name not in fields:
            raise ConfigError(f"{where} has no setting {name!r}. {nearest(name, list(fields))}")
    return {
        name: _setting(config_class, name, fields[name][0], value, where) for name, value in given.items()
    }


def _setting(config_class: type[Any], name: str, expected: Any, given: Any, where: str) -> Setting:
    scalar = _is_scalar(expected)
    texts = [given] if isinstance(given, str) else given
    if scalar and isinstance(texts, list) and len(texts) == 1 and isinstance(texts[0], str):
        span = _SPAN.fullmatch(texts[0])
        if span is not None and (kinds := {int, float} & _parts(expected)):
            return _span(config_class, name, span, whole=kinds == {int}, where=where)
    if isinstance(texts, (list, tuple, range)):
        alternatives = [one for text in texts for one in (_split(text) if scalar else [text])]
    else:
        alternatives = [texts]
    values = [to_json(configure(config_class, {name: one}, where=where))[name] for one in alternatives]
    if not values or len(values) > _MOST_CHOICES:
        raise ConfigError(f"{where}: {name} needs 1 to {_MOST_CHOICES:,} values, but got {len(values):,}.")
    written = [json.dumps(value, sort_keys=True) for value in values]
    if twice := [values[n] for n, text in enumerate(written) if text in written[:n]]:
        raise ConfigError(
            f"{where}: {name}={twice[0]!r} is given twice. Give it once; --seeds repeats a setting."
        )
    return Choices(tuple(values))


def _split(text: Any) -> list[Any]:
    """The alternatives in a text of the command line; a JSON list keeps the commas in its texts."""
    if not isinstance(text, str):
        return [text]
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list):
            return found
    return [part.strip() for part in text.split(",")]


def _span(config_class: type[Any], name: str, text: "re.Match[str]", *, whole: bool, where: str) -> Span:
    ends = [
        to_json(configure(config_class, {name: end.strip()}, where=where))[name] for end in text.groups()[:2]
    ]
    low, high, log = *ends, text[3] is not None
    if any(type(end) not in {int, float} for end in ends) or not low < high or (log and low <= 0):
        raise ConfigError(
            f"{where}: {name}={text[0]} is no range. Expected LOW..HIGH with LOW < HIGH, as in 16..256 or 1e-4..1e-1:log, "
            "where :log needs LOW > 0."
        )
    return Span(low, high, log, whole)


def _parts(expected: Any) -> set[Any]:
    """The types that a declared type may be."""
    if get_origin(expected) in {Union, types.UnionType}:
        return {part for one in get_args(expected) for part in _parts(one)}
    return {expected}


def _is_scalar(expected: Any) -> bool:
    """Whether a comma separates two values of a type, and does not stand inside of one."""
    plain = {bool, int, float, str, Path, type(None), Any, typing.Any}
    return all(
        get_origin(part) is Literal
        or (get_origin(part) is None and (part in plain or not _is_collection(part)))
        for part in _parts(expected)
    )


def _is_collection(expected: Any) -> bool:
    kinds = (list, tuple, set, frozenset, dict, Sequence, Mapping)
    return not isinstance(expected, type) or attrs.has(expected) or issubclass(expected, kinds)
