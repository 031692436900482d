"""Checks of arguments, each in one line where it is used, with one wording for all."""

from collections.abc import Callable
from typing import Any

import attrs

from steploop.errors import ConfigError

__all__ = ["at_least", "is_bool", "require_int"]


def require_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """The value, or a ConfigError that names it, the bound and what came."""
    bounds = f">= {minimum}" if maximum is None else f"in {minimum}..{maximum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer {bounds}, got {value!r} ({type(value).__name__})")
    if value < minimum or (maximum is not None and value > maximum):
        raise ConfigError(f"{name} must be an integer {bounds}, got {value}")
    return value


def at_least(minimum: int) -> Callable[[Any, "attrs.Attribute[Any]", Any], None]:
    """An attrs validator: the field is an integer of at least ``minimum``."""

    def check(_: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
        require_int(field.name, value, minimum=minimum)

    return check


def is_bool(_: Any, field: "attrs.Attribute[Any]", value: Any) -> None:
    """An attrs validator: the field is True or False, not merely truthy."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field.name} must be True or False, got {value!r} ({type(value).__name__})")
