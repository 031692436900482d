"""Count the samples of a dataset, and find out whether they are on a device."""

from typing import Any

from steploop.core.trees import map_tensors, named_leaves
from steploop.data.accepted import is_tensors
from steploop.errors import DataError

__all__ = ["count_dataset", "on_device"]


def on_device(data: Any) -> bool:
    """Whether one of the tensors is not on the CPU."""
    found: list[bool] = []
    map_tensors(lambda t: found.append(t.device.type != "cpu"), data)
    return any(found)


def count_dataset(data: Any) -> int:
    """Count the samples of tensors or of a map-style dataset.

    Raises:
        DataError: its tensors have no common first axis, or its length is not known.
    """
    if is_tensors(data):
        sizes: dict[str, tuple[int, ...]] = {
            name or "the tensor": tuple(t.shape) for name, t in named_leaves(data)
        }
        if any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) != 1:
            raise DataError(
                "the tensors of a dataset must have a common first axis, the samples; their shapes are "
                + ", ".join(f"{name}: {shape}" for name, shape in sizes.items())
            )
        return next(iter(sizes.values()))[0]
    try:
        count: int = len(data)
    except Exception as error:
        raise DataError(
            f"len() of the dataset ({type(data).__name__}) failed: {type(error).__name__}: {error}. A Loader needs its "
            "number of samples; without one, wrap it in a Stream"
        ) from error
    return count
