"""Make the next state from the previous one and a compiled graph's outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from steploop.compilation.flattening import Build, Reference, builder
from steploop.compilation.plans import StatePlan
from steploop.core.state.ownership import Lease
from steploop.core.state.train_state import TrainState

__all__ = ["Advance"]

_EMPTY = {"_graph": None, "_grads": None, "_old_buffers": None}


class Advance:
    """Makes the next state by one plan.

    Args:
        plan: of the state.
        where: for each reference of the plan, the index of its tensor in what the graph gave.
    """

    def __init__(self, plan: StatePlan, where: Sequence[int]) -> None:
        self._plan = plan
        self._constant = {**_EMPTY, **plan.changed}
        self._given: list[tuple[str, Build]] = [
            (name, builder(_moved(value, where))) for name, value in plan.given.items()
        ]
        self._tensors = [(place, where[reference.index]) for place, reference in plan.tensors.items()]

    def __call__(self, state: TrainState, given: Sequence[Tensor]) -> TrainState:
        """Update counters and loss scale, and pass the tensors on."""
        plan = self._plan
        changes = self._constant.copy()
        for name, build in self._given:
            changes[name] = build(given)
        attempted = state.attempted_steps
        if plan.attempts:
            changes["attempted_steps"] = attempted + plan.attempts
            if plan.on_host:
                changes["finite"] = finite = changes["finite"].item()  # already computed, on the CPU: no wait
                if finite:
                    changes["applied_steps"] = state.applied_steps + 1
                    changes["nonfinite_steps"] = 0
                else:
                    changes["nonfinite_steps"] = state.nonfinite_steps + 1
                if state.scale is not None:
                    changes["scale"] = state.scale.updated(finite)
        if plan.batches:
            changes["batch"] = state.batch + plan.batches
        if not plan.on_host:
            _count_on_device(state, changes)
        if plan.donated:
            changes["_generation"] = state._lease.generation  # the call counted it on before the graph ran
        else:
            changes |= self._copies(state, given)
        return state.replace(**changes)

    def _copies(self, state: TrainState, given: Sequence[Tensor]) -> dict[str, Any]:
        """Copy the fields that hold tensors, for a step that keeps the old state."""
        fields: dict[str, Any] = {"_params": {}, "_buffers": {}, "_ema": None if state._ema is None else {}}
        slots = {name: dict(slot) for name, slot in state._slots.items()}
        for (field, name, key), index in self._tensors:
            tensor = given[index]
            if key is not None:
                slots[name][key] = tensor
            elif field == "_params":
                fields[field][name] = _leaf_like(state._params[name], tensor)
            else:
                fields[field][name] = tensor
        leaves = tuple(fields["_params"][name] for name in state._machine.trainable)
        return {**fields, "_slots": slots, "_leaves": leaves, "_lease": Lease(), "_generation": 0}


def _leaf_like(param: Tensor, tensor: Tensor) -> Tensor:
    if isinstance(param, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=param.requires_grad)
    return tensor.requires_grad_(param.requires_grad)


def _count_on_device(state: TrainState, changes: dict[str, Any]) -> None:
    """Put the graph's counts into the state's fields, without reading them."""
    if isinstance(state.applied_steps, int):
        changes["_known"] = (state.applied_steps, state.attempted_steps)
    if state.scale is not None:
        scale, tracker = changes["scale"]
        changes["scale"] = attrs.evolve(state.scale, scale=scale, growth_tracker=tracker)


def _moved(template: Any, where: Sequence[int]) -> Any:
    """Renumber a template's references for the outputs of the pruned graph."""
    if isinstance(template, Reference):
        return Reference(where[template.index])
    if isinstance(template, Mapping):
        return {key: _moved(value, where) for key, value in template.items()}
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(_moved(value, where) for value in template))
    if isinstance(template, (list, tuple)):
        return type(template)(_moved(value, where) for value in template)
    if attrs.has(type(template)):
        return attrs.evolve(
            template,
            **{
                f.alias: _moved(getattr(template, f.name), where)
                for f in attrs.fields(type(template))
                if f.init
            },
        )
    return template
