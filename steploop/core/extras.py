"""Import an optional dependency, or say which extra to install."""

import importlib
from types import ModuleType

from steploop.errors import MissingExtraError

__all__ = ["import_extra"]


def import_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, which comes with the extra ``extra``.

    Args:
        module: its dotted name, for instance "matplotlib.pyplot".
        extra: the extra of this package that brings it.
        purpose: what it is needed for; begins the message.

    Raises:
        MissingExtraError: it is not installed; the message holds the command that installs it.

    Example:
        >>> pyplot = import_extra("matplotlib.pyplot", extra="plot", purpose="Drawing curves")
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs {module.partition('.')[0]}, which is not installed ({error}). "
            f"Install it with: pip install 'steploop[{extra}]'"
        ) from error
