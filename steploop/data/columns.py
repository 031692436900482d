"""Turn arrays and tables of NumPy, pandas and Arrow into tensors, without importing the last two."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steploop.errors import DataError

__all__ = ["column_of", "columns_of"]


def column_of(data: Any, name: str) -> Tensor | None:
    """Turn one array into a tensor that shares its memory where it can; None: it is no array.

    Args:
        data: a tensor, a NumPy array, a pandas Series, or an Arrow array.
        name: what messages call it.

    Raises:
        DataError: it holds something else than numbers, or has gaps.
    """
    if isinstance(data, Tensor):
        return _checked(data, name)
    if isinstance(data, np.ndarray):
        return _from_array(data, name)
    library, kind = _library(data), type(data).__name__
    if library == "pandas" and kind == "Series":
        if gaps := int(data.isna().sum()):  # pandas makes a nan of a gap in a file
            raise _gaps(name, gaps)
        return _from_array(data.to_numpy(), f"{name} (dtype {data.dtype})")
    if library == "pyarrow" and hasattr(data, "null_count"):  # an array, chunked or not
        if data.null_count:
            raise _gaps(name, data.null_count)
        try:
            # a chunked array takes no arguments
            array = data.to_numpy() if kind == "ChunkedArray" else data.to_numpy(zero_copy_only=False)
        except Exception as error:  # a type that NumPy lacks
            raise DataError(f"{name} is of Arrow's type {data.type}: {error}") from error
        return _from_array(array, f"{name} (Arrow's {data.type})")
    return None


def columns_of(data: Any, name: str) -> dict[Any, Tensor] | None:
    """Turn a table into one tensor for each column; None: it is no table.

    Args:
        data: a pandas DataFrame, an Arrow table or record batch.
        name: what messages call it.

    Raises:
        DataError: a column holds something else than numbers, or has gaps.
    """
    library, kind = _library(data), type(data).__name__
    if library == "pandas" and kind == "DataFrame":
        names, columns = list(data.columns), [data.iloc[:, i] for i in range(len(data.columns))]
    elif library == "pyarrow" and kind in {"Table", "RecordBatch"}:
        names, columns = list(data.schema.names), list(data.columns)
    else:
        return None
    if not names or len(set(names)) < len(names):
        raise DataError(f"{name} must have columns with different names, got {names}")
    found: dict[Any, Tensor] = {}
    for key, column in zip(names, columns, strict=True):
        tensor = column_of(column, f"{name}[{key!r}]")
        assert tensor is not None  # noqa: S101  (a column of a table is an array)
        found[key] = tensor
    return found


def _library(data: Any) -> str:
    return type(data).__module__.partition(".")[0]


def _gaps(name: str, count: int) -> DataError:
    return DataError(
        f"{name} lacks {count} of its values: fill them in, or leave those rows out. If nan is meant, give NumPy arrays, "
        "in which it is a number"
    )


def _from_array(array: Any, name: str) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise DataError(f"{name} is a masked array, and a tensor has no mask: fill it (array.filled(...))")
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16 or array.dtype == np.longdouble:
        raise DataError(
            f"{name} holds no numbers that torch knows, but {array.dtype}. Convert it (array.astype('float32'), codes "
            "for categories or text), leave it out, or give a list of samples and collate= (of a DataFrame: "
            "frame.to_dict('records'))"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):  # a reversed view, which no tensor can be
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():
        # batches are copies, so nothing writes to an array that is read-only
        warnings.filterwarnings("ignore", "The given NumPy array is not writ", UserWarning)
        return torch.from_numpy(array)


def _checked(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_nested or tensor.layout != torch.strided:
        raise DataError(
            f"{name} is a tensor of layout {tensor.layout}, from which no batch can be cut: give its .to_dense(), or a "
            "list of samples and collate="
        )
    return tensor
