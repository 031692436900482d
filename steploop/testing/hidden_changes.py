"""Find values that a model or an optimizer keeps outside of the state, and that change unseen."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from steploop.testing.state_comparison import State, members

__all__ = ["hidden_values", "what_changed"]

# Only plain values are looked at: tensors belong to the state, and anything else may be too large to look into.
_PLAIN = (bool, int, float, str, type(None))
_MODULE_FIELDS = set(vars(nn.Module())) | {"training"}


def hidden_values(state: State) -> dict[str, Any]:
    """Place -> plain value: attributes of each module, attributes and groups of each optimizer."""
    return {
        f"{name}: {place}" if name else place: value
        for name, one in members(state).items()
        for place, value in _of_machines(one.machine.model, one.machine.optimizer)
    }


def what_changed(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first place whose value changed, as the end of a sentence; "" where none did."""
    for place, value in after.items():
        if place in before and before[place] != value and value == value:  # noqa: PLR0124  (nan)
            return f". What changed is {place}, from {before[place]!r} to {value!r}"
    return ""


def _of_machines(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Any]]:
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        for key, value in group.items():
            if isinstance(value, _PLAIN):
                yield f"{key!r} of the optimizer's group {index}", value
    for key, value in vars(optimizer).items():
        if isinstance(value, _PLAIN) and not key.startswith("_"):
            yield f"the attribute {key} of the optimizer", value
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) and key not in _MODULE_FIELDS:
                yield f"the attribute {f'{path}.' if path else ''}{key} of the model", value
