"""Updates that are taken or skipped by a tensor, on the device or in a trace: the host never knows which."""

from typing import Any

import torch
from torch import Tensor

from steploop.core.state.parts import field_names
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.optimizer_run import run_optimizer
from steploop.core.trees import map_tensors, paths, with_leaves
from steploop.errors import ConfigError

__all__ = ["decided_by_fused_optimizer", "selected"]


def _counts_and_buffers(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """Counters moved by a tensor, and the buffers, the carry and averages of the step or of its beginning."""
    began = state.tensors if state.flight.began is None else state.flight.began.tensors
    old, tensors = began.buffers, state.tensors
    buffers = {name: torch.where(finite, b, old.get(name, b)) for name, b in tensors.buffers.items()}
    others = {
        name: _selected_tree(finite, new, before, name)
        for name in field_names(type(tensors))
        if name not in {"params", "buffers", "slots"}
        and (new := getattr(tensors, name)) is not (before := getattr(began, name))
    }
    trace = trace_of(state)
    return {
        **(_counts(state, finite) if trace is None else trace.counts(state, finite)),
        "tensors": tensors.replace(buffers=buffers, **others),
    }


def _counts(state: TrainState, finite: Tensor) -> dict[str, Any]:
    ones = finite.long()
    counts = {
        "applied_steps": state.applied_steps + ones,
        "nonfinite_steps": (state.nonfinite_steps + 1) * (1 - ones),
    }
    if isinstance(state.applied_steps, Tensor):
        return counts
    return {**counts, "known": (state.applied_steps, state.attempted_steps)}


def _selected_tree(finite: Tensor, new: Any, old: Any, field: str) -> Any:
    """``new`` where the step is finite and ``old`` where it is not, leaf for leaf."""
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.shape == old.shape:
        return new if new is old else torch.where(finite, new, old)
    if isinstance(new, dict) and isinstance(old, dict) and new.keys() == old.keys():
        return {key: _selected_tree(finite, new[key], old[key], field) for key in new}
    if isinstance(new, (list, tuple)) and type(new) is type(old) and len(new) == len(old):
        return type(new)(_selected_tree(finite, a, b, field) for a, b in zip(new, old, strict=True))
    if type(new) is type(old) and new == old:
        return new
    raise ConfigError(
        f"optimizer_step: the {field} of the state changed its shape in a step that the device decides about, so that a skip "
        "could not bring the old one back. Keep its shape, set it after optimizer_step, or use an optimizer without fused=True."
    )


def decided_by_fused_optimizer(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """A fused optimizer reads ``found_inf`` in its own kernel, and changes nothing where it is 1."""
    optimizer: Any = state.machine.optimizer
    changed = _counts_and_buffers(state, finite)
    new = [name for name, slot in state.tensors.slots.items() if not slot]
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        slots = run_optimizer(state)["tensors"].slots
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    for name in new:
        for value in slots[name].values():
            if isinstance(value, Tensor):
                # a skipped kernel leaves a new momentum buffer as it was made: memory that no kernel wrote
                value.copy_(torch.where(finite, value, torch.zeros_like(value)))
    return {**changed, "tensors": changed["tensors"].replace(slots=slots)}


def selected(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """Step, then take the old values back where the step was not finite: for a step that is being traced."""
    tensors = state.tensors
    changed = _counts_and_buffers(state, finite)
    old_params = {name: p.detach().clone() for name, p in tensors.params.items()}
    old_slots = {name: map_tensors(Tensor.clone, slot) for name, slot in tensors.slots.items()}
    old_beside = {p: t.clone() for p, t in paths(tensors.beside) if isinstance(t, Tensor)}
    ran = run_optimizer(state)
    slots = ran["tensors"].slots
    with torch.no_grad():
        for name in state.machine.trainable:
            leaf = tensors.params[name]
            leaf.copy_(torch.where(finite, leaf, old_params[name]))
            for key, value in slots[name].items():
                if isinstance(value, Tensor) and key in old_slots[name]:  # a new one ends the trace
                    value.copy_(torch.where(finite, value, old_slots[name][key]))
    beside = ran["tensors"].beside
    if beside:
        leaves = {p: t for p, t in paths(beside) if isinstance(t, Tensor) and p in old_beside}
        beside = with_leaves(beside, {p: torch.where(finite, t, old_beside[p]) for p, t in leaves.items()})
    ran |= {**changed, "tensors": changed["tensors"].replace(slots=slots, beside=beside)}
    return ran
