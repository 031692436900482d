"""Check arguments and fields where they are given: attrs converters and validators, and one check for a call.

A converter turns any number of the right kind (NumPy's too) into a plain ``float`` or ``int`` and leaves everything
else as it is, so that the validator after it can show the value that the user gave.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import attrs

from steploop.errors import ConfigError

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def to_real(value: object) -> Any:
    """Turn any real number into a plain float; leave anything else (bool and str too) as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of float
        return value


def to_integer(value: object) -> Any:
    """Turn any integer into a plain int; leave anything else (bool, float and str too) as it is."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return value
    return int(value)


def refuse(owner: object, name: str, expected: str, value: object, hint: str) -> ConfigError:
    """Make the error for a field: its class, its name, what was expected, what came, what to do."""
    return ConfigError(f"{type(owner).__name__}: {_problem(name, expected, value)}. {hint}".rstrip())


def _problem(name: str, expected: str, value: object) -> str:
    return f"{name} must be {expected}, got {value!r}"


def require_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """Check an argument of a function; give it back as a plain int.

    Raises:
        ConfigError: it is no integer, or out of bounds.
    """
    number = to_integer(value)
    if not isinstance(number, int) or isinstance(number, bool) or not _within(number, minimum, maximum):
        bounds = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
        raise ConfigError(f"{_problem(name, f'an integer {bounds}', value)}.")
    return number


def _within(number: int, minimum: int, maximum: int | None) -> bool:
    return number >= minimum and (maximum is None or number <= maximum)


def real(
    *,
    hint: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Validator:
    """Make a validator: a finite float within the bounds.

    Args:
        hint: a sentence that says what to do instead.
        at_least: the value must be >= this.
        above: the value must be > this.
        at_most: the value must be <= this.
        below: the value must be < this.

    Returns:
        A validator for ``attrs.field``, which raises ConfigError.
    """
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if (
            not isinstance(value, float)
            or not math.isfinite(value)
            or (at_least is not None and value < at_least)
            or (above is not None and value <= above)
            or (at_most is not None and value > at_most)
            or (below is not None and value >= below)
        ):
            raise refuse(owner, attribute.name, expected, value, hint)

    return check


def integer(*, at_least: int, hint: str = "") -> Validator:
    """Make a validator: an int >= ``at_least``, and no bool; its ConfigError ends in ``hint``."""

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise refuse(owner, attribute.name, f"an integer >= {at_least}", value, hint)

    return check


def one_of(*choices: str, hint: str) -> Validator:
    """Make a validator: one of these strings; its ConfigError ends in ``hint``."""
    expected = "one of " + ", ".join(repr(choice) for choice in choices)

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise refuse(owner, attribute.name, expected, value, hint)

    return check


def boolean(*, hint: str = "") -> Validator:
    """Make a validator: True or False, not only something truthy; its ConfigError ends in ``hint``."""

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, bool):
            raise refuse(owner, attribute.name, "True or False", value, hint)

    return check
