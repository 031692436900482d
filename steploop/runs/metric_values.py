"""Read the metrics that an evaluation returns as plain numbers, or refuse them by name."""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from steploop.errors import ObjectiveError

__all__ = ["plain_metrics", "read_metrics"]


def read_metrics(returned: Any) -> dict[str, float | None]:
    """The metrics that ``Recipe.evaluate`` returned, as plain numbers.

    Python's and NumPy's numbers and tensors of shape () are numbers; None stands for a metric without a value.

    Raises:
        ObjectiveError: it is no mapping of names to numbers; says which metric, and what it is.
    """
    if not isinstance(returned, Mapping):
        raise ObjectiveError(
            f"Recipe.evaluate must return a mapping of metric names to numbers, but returned {type(returned).__name__}. "
            'Return for instance {"loss": 0.5}.'
        )
    return {_name(name): _number(name, value) for name, value in returned.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ObjectiveError(f"Recipe.evaluate: the name of a metric must be a text, but one is {name!r}.")
    return name


def _number(name: Any, value: Any) -> float | None:
    if value is None or type(value) in {int, float}:
        found: float | None = value
        return found
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()  # waits for the device
    if isinstance(value, (bool, numbers.Real)):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    shape = (
        f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else f" {value!r:.80}"
    )
    raise ObjectiveError(
        f"Recipe.evaluate: the metric {name!r} must be a number or None, but is a {type(value).__name__}{shape}. "
        "Return a float: of a tensor, value.mean().item()."
    )


def plain_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics with None for what JSON cannot hold."""
    infinity = float("inf")
    return {name: v if v is not None and abs(v) < infinity else None for name, v in metrics.items()}
