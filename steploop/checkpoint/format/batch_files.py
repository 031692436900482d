"""Store a batch as JSON (its structure) and tensors, without any code in the file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steploop.checkpoint.format.layout import spec_from_json, spec_of
from steploop.core.batch_parts import Parts
from steploop.errors import CheckpointUnsupportedError, DataError

__all__ = ["decode", "encode"]


def encode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the structure of a batch as JSON; put its tensors into ``tensors``, by number.

    Raises:
        CheckpointUnsupportedError: it holds a value that is no tensor, number, text, list, tuple or dict.
    """
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree
        return {"tensor": name, "spec": spec_of(name, tree).to_json()}
    if type(tree) is dict and all(isinstance(key, (str, int)) for key in tree):
        return {"dict": [[key, encode(value, tensors)] for key, value in tree.items()]}
    if type(tree) in {list, tuple}:
        return {type(tree).__name__: [encode(value, tensors) for value in tree]}
    if type(tree) is Parts and len(tree.batches) == tree.total:
        return {"parts": [encode(value, tensors) for value in tree.batches]}
    if isinstance(tree, float):
        return {"float": repr(tree)}
    if tree is None or isinstance(tree, (bool, int, str)):
        return {"value": tree}
    raise CheckpointUnsupportedError(
        f"a batch that holds a {type(tree).__name__} is read from the data again, at its cursor"
    )


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: PLR0911  (a case for each kind of node)
    """Rebuild a batch from its structure and its tensors.

    Raises:
        DataError: ``encode`` writes no such structure.
    """
    match node:
        case {"tensor": str(name), "spec": entry}:
            spec, value = spec_from_json(name, entry), tensors.get(name)
            if value is None or (value.dtype, tuple(value.shape)) != (spec.torch_dtype, spec.shape):
                raise DataError(
                    f"capsule.json: expected the tensor {name} to be {spec}, but batch.safetensors holds "
                    f"{'none' if value is None else spec_of(name, value)}. One of the two was changed."
                )
            if spec.stride is None:
                return value
            return torch.empty_strided(spec.shape, spec.stride, dtype=value.dtype).copy_(value)
        case {"dict": list(items)} if all(isinstance(i, list) and len(i) == 2 for i in items):
            return {_key(key): decode(value, tensors) for key, value in items}
        case {"list": list(items)}:
            return [decode(value, tensors) for value in items]
        case {"tuple": list(items)}:
            return tuple(decode(value, tensors) for value in items)
        case {"parts": list(items)}:
            return Parts([decode(value, tensors) for value in items], range(len(items)), len(items))
        case {"float": str(text)}:
            return float(text)
        case {"value": value}:
            return value
        case _:
            raise DataError(
                f"capsule.json: expected a part of a batch, but found {str(node)[:80]!r}. The file was changed."
            )


def _key(key: Any) -> str | int:
    if not isinstance(key, (str, int)):
        raise DataError(
            f"capsule.json: expected text or a whole number as a key, but found {str(key)[:80]!r}. The file was changed."
        )
    return key
