"""What an optimizer that is none of torch's keeps: what a state can hold of it, and what is refused by name."""

import enum
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steploop.core.state.copying import plain_copy
from steploop.core.state.shared_memory import shared_memory
from steploop.core.trees import named_leaves, unkeepable
from steploop.errors import ConfigError

__all__ = ["STATIC", "attributes_of", "check_hyper", "check_keepable", "check_slots", "restore_attributes"]

# Values that say how an optimizer computes: constants of its description, which do not change while it steps.
STATIC = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, torch.dtype, torch.device,
    torch.layout, enum.Enum,
)  # fmt: skip


# The attributes that every ``torch.optim.Optimizer`` has.
_BASE = frozenset(
    {
        *vars(torch.optim.SGD([torch.zeros(())], lr=0.0)),
        "_step_count", "_opt_called", "_warned_capturable_if_run_uncaptured",
    }
)  # fmt: skip


def attributes_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of the optimizer's own attributes that are values: numbers, texts, tensors, trees of them."""
    return {
        name: plain_copy(value)
        for name, value in vars(optimizer).items()
        if name not in _BASE
        and not isinstance(value, STATIC)
        and not _is_of_groups(optimizer, value)
        and unkeepable(value) is None
    }


def _is_of_groups(optimizer: torch.optim.Optimizer, value: Any) -> bool:
    """Whether a value is the list of the groups itself, or of the parameters of one: both are pointed at other values."""
    groups = optimizer.param_groups
    return value is groups or any(value is group or value is group["params"] for group in groups)


def restore_attributes(optimizer: torch.optim.Optimizer, values: Mapping[str, Any]) -> None:
    """Give the optimizer the attributes that a state holds."""
    for name, value in values.items():
        setattr(optimizer, name, plain_copy(value))


def check_keepable(optimizer: torch.optim.Optimizer, hyper: tuple[Mapping[str, Any], ...]) -> None:
    """Refuse an optimizer that keeps what no state can hold: another optimizer, a queue, an object.

    Raises:
        ConfigError: names the attribute or the hyperparameter.
    """
    kind = type(optimizer).__name__
    for name in ("state", "param_groups"):
        made = getattr(type(optimizer), name, None)
        if isinstance(made, property) and made.fset is None:
            raise ConfigError(
                f"{kind} computes its {name} from another optimizer's, so that a state cannot put values into it. Use the inner "
                "optimizer, and write what the wrapper does as a function of the state."
            )
    for name, value in vars(optimizer).items():
        if name in _BASE or isinstance(value, STATIC) or _is_of_groups(optimizer, value):
            continue
        if isinstance(value, torch.optim.Optimizer):
            raise ConfigError(
                f"{kind} wraps another optimizer ({name}: {type(value).__name__}), whose state is not in its own "
                "state_dict(), so that a checkpoint would lose it. Use the inner optimizer, and write what the wrapper does "
                "as a function of the state."
            )
        if (found := unkeepable(value)) is not None:
            raise _refusal(kind, f"the attribute {name}{found[0]}", found[1])
        _refuse_parameters(optimizer, f"the attribute {name}", value)
    for index, group in enumerate(hyper):
        for key, value in group.items():
            _refuse_parameters(optimizer, f"{key!r} of group {index}", value)


def check_hyper(optimizer: torch.optim.Optimizer, hyper: tuple[Mapping[str, Any], ...]) -> None:
    """Refuse a hyperparameter that no state can hold.

    Raises:
        ConfigError: names it.
    """
    for index, group in enumerate(hyper):
        for key, value in group.items():
            if (found := unkeepable(value)) is not None:
                raise _refusal(type(optimizer).__name__, f"{key!r} of group {index}{found[0]}", found[1])


def check_slots(
    optimizer: torch.optim.Optimizer, slots: Mapping[str, Any], hyper: Any, beside: Mapping[str, Any]
) -> None:
    """Refuse what the first step of an optimizer has made and no state can hold.

    Raises:
        ConfigError: names the parameter and the key.
    """
    kind = type(optimizer).__name__
    for where, tree in (
        ("for the parameter ", slots),
        ("in its groups: ", list(hyper)),
        ("beside: ", beside),
    ):
        found = unkeepable(tree)
        if found is not None:
            raise _refusal(kind, f"{where}{found[0].lstrip('.')}", found[1])
        _refuse_parameters(optimizer, where, tree)
    for name, value in vars(optimizer).items():
        if name in _BASE or isinstance(value, (*STATIC, Tensor)) or _is_of_groups(optimizer, value):
            continue
        if found := unkeepable(value):
            raise _refusal(kind, f"the attribute {name}{found[0]}", found[1])


def _refuse_parameters(optimizer: torch.optim.Optimizer, where: str, tree: Any) -> None:
    """Refuse parameters that an optimizer keeps a second time: of another state's step it would train the wrong ones."""
    params = {str(id(p)): p for group in optimizer.param_groups for p in group["params"]}
    dot = "" if where.endswith(" ") else "."
    leaves = {f"{dot}{name}" if name else "": t for name, t in named_leaves(tree) if isinstance(t, Tensor)}
    if (shared := shared_memory(params, leaves)) is not None:
        name = next(one for one in shared if one in leaves)
        raise ConfigError(
            f"{type(optimizer).__name__} keeps one of its parameters a second time ({where}{name}). A state lends it the "
            "parameters in param_groups only. Let it look there, or keep a copy."
        )


def _refusal(kind: str, what: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{kind} keeps a {type(value).__name__} ({what}), which a state cannot hold: copies and checkpoints would lose "
        "it. Use an optimizer that keeps tensors, numbers and texts."
    )
