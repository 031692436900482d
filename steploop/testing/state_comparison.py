"""Compare states bit for bit; copy them, and fold steps over batches."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steploop.core.state.parts import field_names, plain_names
from steploop.core.state.several import State, clone, members
from steploop.core.state.train_state import TrainState
from steploop.core.trees import first_difference, map_tensors

__all__ = [
    "State",
    "Step",
    "clone",
    "copied",
    "fold",
    "members",
    "norm64",
    "require",
    "require_same",
    "values",
]

Step = Callable[[Any, Any], Any]


def values(state: State) -> dict[str, Any]:
    """Return all that the next step depends on, as one tree of tensors and plain values.

    Example:
        >>> values(state)["applied_steps"]
        0
    """
    trees = {name: _values(one.settle()) for name, one in members(state).items()}
    return trees if isinstance(state, Mapping) else trees[""]


def _values(state: TrainState) -> dict[str, Any]:
    state.check_alive("values")
    tensors = {name: getattr(state.tensors, name) for name in field_names(type(state.tensors))}
    return tensors | {name: getattr(state, name) for name in plain_names(type(state))}


def copied(tree: Any) -> Any:
    """Copy a tree and its tensors.

    Example:
        >>> before = copied(dict(state.params))
    """
    return map_tensors(lambda t: t.detach().clone(), tree)


def fold(step: Step, batches: Iterable[Any], state: State) -> Any:
    """Return ``functools.reduce(step, batches, state)``.

    Example:
        >>> fold(train_step, batches, state).step
        4
    """
    return reduce(step, batches, state)


def require(condition: object, message: str) -> None:
    """Raise AssertionError unless ``condition`` holds (an ``assert`` would vanish under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def require_same(found: Any, expected: Any, law: str) -> None:
    """Raise AssertionError that names the first tensor or value that differs, and by how much.

    Args:
        found: a state, several by name, or any tree.
        expected: the same.
        law: what was promised, in words; the message begins with it.

    Example:
        >>> require_same(torch.zeros(2), torch.tensor([0.0, 1.0]), "they must be equal")
        Traceback (most recent call last):
        ...
        AssertionError: they must be equal: ...
    """
    difference = first_difference(_tree(found), _tree(expected))
    if difference is not None:
        difference = _GROUP.sub(r"\1the optimizer's group \2: ", difference)
        difference = _BESIDE.sub(r"\1the optimizer's own ", difference)
    require(difference is None, f"{law}: {difference}")


# Leaves of ``values``: what the optimizer keeps of its own, and in its groups, whose hyperparameters stand there too.
_BESIDE = re.compile(r"^((?:\w+\.)?)beside\.(?:attributes\.)?")
_GROUP = re.compile(r"^((?:\w+\.)?)hyper\.(\d+)\.")


def _tree(value: Any) -> Any:
    single = isinstance(value, TrainState)
    several = isinstance(value, Mapping) and value and all(isinstance(v, TrainState) for v in value.values())
    return values(value) if single or several else _dense(value)


def _dense(tree: Any) -> Any:
    """Take apart what cannot be compared bit for bit as it is: sparse and nested tensors, arrays."""
    return map_tensors(_dense_parts, tree, other=_array_parts)


def _array_parts(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    return torch.from_numpy(leaf) if leaf.dtype.kind in "biufc" else leaf.tolist()


def _dense_parts(tensor: Tensor) -> Any:
    if tensor.is_nested:
        return list(tensor.detach().unbind())
    if tensor.layout is torch.strided:
        return tensor
    parts = torch.Tensor.to_sparse(tensor.detach(), layout=torch.sparse_coo).coalesce()
    return {"indices": parts.indices(), "values": parts.values(), "shape": tuple(tensor.shape)}


def norm64(grads: Iterable[Tensor]) -> float:
    """Compute the L2 norm of all entries together, in float64."""
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))
