"""Import a package's public names when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, homes: Mapping[str, str], namespace: dict[str, Any]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    ``steploop --version``, or the refusal of a mistyped option, does not wait two seconds for torch.

    Args:
        package: its ``__name__``.
        homes: public name -> module it is defined in, relative to ``package``.
        namespace: the package's ``globals()``; a name that was used is kept there.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = namespace[name] = getattr(import_module(f".{homes[name]}", package), name)
        return value

    return get, lambda: sorted(namespace.get("__all__", homes))
