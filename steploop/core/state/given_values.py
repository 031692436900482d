"""What a user gives a state besides its first values: other parameters and buffers, and a carry of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.core.state.copying import lazy_clone, leaf_like
from steploop.core.state.parts import TensorValues
from steploop.core.state.sharded import as_sharded
from steploop.core.trees import map_tensors, unkeepable
from steploop.errors import ConfigError

__all__ = ["check_values", "own_carry", "with_values"]


def check_values(tensors: TensorValues, values: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a name that a state does not have, another shape or another dtype."""
    have = {**tensors.params, **tensors.buffers}
    for name, value in values.items():
        if name not in have:
            more = ", ..." if len(have) > 10 else ""
            raise ConfigError(
                f"with_params: the state has no parameter or buffer {name!r}. It has: {', '.join(list(have)[:10])}{more}."
            )
        came = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        expected = f"{tuple(have[name].shape)} {have[name].dtype}"
        if came != expected:
            raise ConfigError(f"with_params: {name} must be {expected}, but is {came}.")


def with_values(
    tensors: TensorValues, values: Mapping[str, Tensor], trainable: Sequence[str]
) -> TensorValues:
    """The tensors of a state with copies of other parameters and buffers."""
    params, buffers = dict(tensors.params), dict(tensors.buffers)
    for name, value in values.items():
        like = params[name] if name in params else buffers[name]
        copied = torch.empty_like(like, requires_grad=False).copy_(as_sharded(value.detach(), like))
        if name in params:
            params[name] = leaf_like(like, copied)
        else:
            buffers[name] = copied
    return tensors.replace(params=params, buffers=buffers, leaves=tuple(params[n] for n in trainable))


def own_carry(carry: Any) -> Any:
    """A copy of the tree with its tensors detached; ConfigError where a checkpoint could not keep it."""
    if carry is None:
        return None
    if (found := unkeepable(carry)) is not None:
        name, value = found
        raise ConfigError(
            f"The carry of a state must be a tree of tensors, numbers, texts and None (lists, tuples, mappings), but "
            f"{('carry' + name)!r} is a {type(value).__name__}."
        )
    # while a step is traced nobody but its own code holds them
    return map_tensors(lambda t: lazy_clone(t) if type(t) is Tensor else t.detach(), carry)
