"""How many samples there are, and where: a dataset is looked at before its first batch is made."""

from typing import Any

from torch.utils.data import IterableDataset

from steploop.core.trees import map_tensors
from steploop.data.batch_requests import is_tensors
from steploop.errors import DataError

__all__ = ["count_dataset", "on_device"]


def on_device(data: Any) -> bool:
    """Whether one of its tensors is not on the CPU."""
    found: list[bool] = []
    map_tensors(lambda t: found.append(t.device.type != "cpu"), data)
    return any(found)


def count_dataset(data: Any) -> int:
    """The number of samples.

    Raises:
        DataError: it has no length, its tensors have no common first axis, or its samples cannot be had by index.
    """
    if is_tensors(data):
        sizes: list[tuple[int, ...]] = []
        map_tensors(lambda t: sizes.append(tuple(t.shape)), data)
        if any(not shape for shape in sizes) or len({shape[0] for shape in sizes}) != 1:
            raise DataError(
                f"the tensors must have a common first axis, the samples; their shapes are {sizes}"
            )
        return sizes[0][0]
    what = type(data).__name__
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise DataError(
            f"a Loader needs a dataset with __len__ and __getitem__ (map-style), so that it can go to any position; "
            f"{what} has no samples by index: wrap it in a Stream, which says what can be resumed and what not"
        )
    try:
        return len(data)
    except Exception as error:
        raise DataError(f"len() of the dataset ({what}) failed: {type(error).__name__}: {error}") from error
