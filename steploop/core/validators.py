"""Checks of hyperparameters at the door: attrs converters, and validators whose message says what to do.

A converter takes any number of the right kind (NumPy's too) to a plain ``float`` or ``int`` and leaves everything
else as it came, so that the validator after it can show the user the value that was given.
"""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import attrs

from steploop.errors import ConfigError

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def to_real(value: object) -> Any:
    """A plain float for any real number; anything else (bool and str included) as it came."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return float(value)
    except OverflowError:  # an int beyond the range of float
        return value


def to_integer(value: object) -> Any:
    """A plain int for any integer; anything else (bool, float and str included) as it came."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return value
    return int(value)


def refuse(owner: object, name: str, expected: str, value: object, hint: str) -> ConfigError:
    """The error for a hyperparameter: whose it is, its name, what was expected, what came, what to do."""
    return ConfigError(f"{type(owner).__name__}: {name} must be {expected}, got {value!r}. {hint}")


def real(
    *,
    hint: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Validator:
    """A validator: a finite float within the bounds given.

    Args:
        hint: what to do about a value that is refused; a sentence.
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


def integer(*, at_least: int, hint: str) -> Validator:
    """A validator: an int that is no bool and is >= ``at_least``; raises ConfigError, which ends in ``hint``."""

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise refuse(owner, attribute.name, f"an integer >= {at_least}", value, hint)

    return check


def one_of(*choices: str, hint: str) -> Validator:
    """A validator: one of the strings given; raises ConfigError, which ends in ``hint``."""
    expected = "one of " + ", ".join(repr(choice) for choice in choices)

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise refuse(owner, attribute.name, expected, value, hint)

    return check


def boolean(*, hint: str) -> Validator:
    """A validator: True or False and nothing that merely counts as one; raises ConfigError, which ends in ``hint``."""

    def check(owner: object, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, bool):
            raise refuse(owner, attribute.name, "True or False", value, hint)

    return check
