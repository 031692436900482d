"""Turn what a Loader is given into tensors or a dataset; refuse anything else by name."""

import dataclasses
from collections import UserList, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from steploop.core.trees import map_tensors
from steploop.data.columns import column_of, columns_of
from steploop.errors import DataError

__all__ = ["accepted", "is_tensors"]

_TAKES = (
    "A Loader takes a tensor or NumPy array whose first axis is the samples; a tuple, mapping or dataclass of them; a "
    "pandas DataFrame; an Arrow table; a list of samples (tuples, dicts, numbers); or a dataset with __len__ and "
    "__getitem__"
)


_ARRAYS = "give numpy.asarray(array)"
# A library whose objects look like a dataset and are none -> what to do.
_REFUSED_LIBRARIES = {
    "cupy": "give torch.as_tensor(array)",
    "jax": _ARRAYS,
    "jaxlib": _ARRAYS,
    "polars": "give its .to_arrow()",
    "scipy": "a sparse matrix has no samples by index: give its .toarray()",
    "tensordict": "give its .to_dict()",
    "tensorflow": _ARRAYS,
}


def accepted(data: Any, *, collates: bool = False) -> Any:
    """Turn what a Loader was given into tensors, or a dataset with samples by index.

    Args:
        data: see `Loader`.
        collates: whether the user makes batches of a list of samples; then any list is a list of samples.

    Returns:
        Tensors (a tensor, or a tuple, mapping, attrs class or dataclass of them), or a map-style dataset.

    Raises:
        DataError: it is no dataset; says what to give instead.
    """
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, (list, UserList, deque)):
        _check_list(data, collates=collates)
        return data
    if _is_dataset(data):
        # default_collate turns lists of token ids into one tensor for each position
        bare = _origin(data) == "datasets" and not collates and data.format["type"] is None
        return data.with_format("torch") if bare else data
    converted: dict[int, Any] = {}
    _convert(data, "the dataset", converted)
    if id(data) in converted:
        return converted[id(data)]
    return map_tensors(lambda t: converted.get(id(t), t), data, other=lambda leaf: converted[id(leaf)])


def is_tensors(data: Any) -> bool:
    """Whether ``data`` is a tensor, or a tree of nothing but tensors (a list is a list of samples)."""
    if isinstance(data, Tensor):
        return True
    parts = None if isinstance(data, Dataset) else _parts(data)
    return bool(parts) and all(is_tensors(part) for _, part in parts or ())


def _parts(data: Any) -> list[tuple[str, Any]] | None:
    """The parts of a tuple, mapping, attrs class or dataclass, each with what a message calls it; None: a leaf."""
    if isinstance(data, Mapping):
        return [(f"[{key!r}]", value) for key, value in data.items()]
    if isinstance(data, tuple):
        return [(f"[{i}]", value) for i, value in enumerate(data)]
    if isinstance(data, type) or hasattr(data, "__getitem__"):
        return None
    if attrs.has(type(data)):
        return [(f".{f.name}", getattr(data, f.name)) for f in attrs.fields(type(data))]
    if dataclasses.is_dataclass(data):
        return [(f".{f.name}", getattr(data, f.name)) for f in dataclasses.fields(data)]
    return None


def _convert(data: Any, name: str, converted: dict[int, Any]) -> None:
    """Convert the leaves into ``converted``, by id; refuse what is no column of samples."""
    if _origin(data) in _REFUSED_LIBRARIES:
        raise DataError(f"{name} is a {_kind(data)}: {_REFUSED_LIBRARIES[_origin(data)]}")
    for value in (column_of(data, name), columns_of(data, name)):
        if value is not None:
            converted[id(data)] = value
            return
    parts = _parts(data)
    if not parts or callable(getattr(type(data), "epoch", None)):
        raise _refused(data, name)
    for part, value in parts:
        _convert(value, f"{name}{part}", converted)


def _is_dataset(data: Any) -> bool:
    """Whether it has samples by index, and is neither an array, nor a table, nor text."""
    if isinstance(data, IterableDataset):
        return False
    if isinstance(data, Dataset):
        return True
    if isinstance(data, (str, bytes, bytearray, Mapping, tuple, Tensor, np.ndarray, np.generic)):
        return False
    if _origin(data) in {"pandas", "pyarrow", *_REFUSED_LIBRARIES}:
        return False
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def _check_list(data: Any, *, collates: bool) -> None:
    """Refuse a list that may be samples or columns: [images, labels] is no two samples."""
    first = data[0] if len(data) else None
    long = getattr(first, "ndim", 0) > 0 or isinstance(first, (list, UserList))
    if long and not collates:
        raise DataError(
            f"the dataset is a list of {len(data)} {_kind(first)}s, which may be samples or columns. For columns give "
            "a tuple: (inputs, targets). For samples give one array (torch.stack(samples)), make each sample a tuple, "
            "or say how a list of them becomes a batch: collate=..."
        )


def _refused(data: Any, name: str) -> DataError:
    if isinstance(data, (str, bytes, Path)):
        advice = "Read the file first, with numpy.load, pandas.read_csv or load_images, say"
    elif isinstance(data, DataLoader) or callable(getattr(type(data), "epoch", None)):
        advice = "It makes batches already: give it to the Recipe, or give its dataset to a Loader"
    elif isinstance(data, list) or _is_dataset(data):
        advice = (
            "A part of a tuple or mapping must be a tensor or an array: convert it (torch.tensor(...)), or give a list of "
            "samples, list(zip(inputs, targets)); of several datasets choose one, data['train']"
        )
    elif isinstance(data, (IterableDataset, Iterator)):
        advice = (
            "It has no samples by index (__len__ and __getitem__), so that a Loader cannot go to a position: wrap it in "
            "a Stream, which says what can be resumed, or make a list of it"
        )
    else:
        advice = _TAKES
    return DataError(f"{name} is a {_kind(data)}. {advice}")


def _kind(data: Any) -> str:
    return type(data).__name__


def _origin(data: Any) -> str:
    """The library that a value comes from, without importing it."""
    return type(data).__module__.partition(".")[0]
