"""``optimizer_step``: updates parameters, slots and loss scale, or skips; decided on the host, on the device, or traced."""

from typing import Any

import torch
from torch import Tensor

from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import did_not_fit
from steploop.core.trees import map_tensors
from steploop.errors import NonFiniteError, OutOfMemoryError, StepOrderError

__all__ = ["check_nonfinite", "first_nonfinite", "optimizer_step"]


@shielded
def optimizer_step(state: TrainState, *, donate: bool = True, max_nonfinite_steps: int = 100) -> TrainState:
    """Update parameters, optimizer slots and loss scale; or skip, if a gradient was not finite.

    A step that is not finite changes neither parameters nor slots nor buffers: it is counted, and backs the loss
    scale off. Both kinds advance ``attempted_steps`` and the cursor; only a taken one advances ``applied_steps``.

    Whether to skip is decided on the CPU for nothing. On a GPU it costs no wait with a fused optimizer
    (``Optimizer(torch.optim.AdamW, fused=True)``) or in a compiled step, and one read of the device otherwise.

    Args:
        state: holds unscaled gradients.
        donate: update in place and spend ``state``, at no cost of memory. False copies first and leaves ``state``
            whole and usable: the pure form.
        max_nonfinite_steps: this many steps in a row that are not finite raise; on a device the run looks at the
            count whenever it reads the metrics.

    Returns:
        The state after the step, without gradients.

    Raises:
        StepOrderError: there are no unscaled gradients: ``unscale_and_clip`` comes before.
        NonFiniteError: ``max_nonfinite_steps`` in a row; names the first gradient that was not finite.
        OutOfMemoryError: the update did not fit. ``state`` is intact if it was the first one, which makes the slots, and
            nothing was updated yet; otherwise it is spent, unless ``donate=False``.
    """
    state.check_alive("optimizer_step")
    if state.grad_norm is None or state._grads is None:
        before = "backward_scaled and then unscale_and_clip" if state._grads is None else "unscale_and_clip"
        raise StepOrderError(f"optimizer_step: this state has no unscaled gradients. Call {before} before.")
    finite = state.finite
    if isinstance(finite, Tensor) and type(finite) is Tensor and not state._machine.fused:
        finite = bool(finite.item())  # waits for the device: this optimizer cannot skip by itself
    if not donate:
        state = _copied(state)
    if isinstance(finite, bool):
        advanced = _decided(state, finite=finite)
    elif type(finite) is Tensor:
        advanced = _decided_by_fused_optimizer(state, finite)
    else:
        if (trace := trace_of(state)) is not None:
            trace.limit_nonfinite(state, max_nonfinite_steps)
        advanced = _selected(state, finite)  # type: ignore[arg-type]  # a tensor that is being traced
    scale = None if state.scale is None else state.scale.updated(finite)  # type: ignore[arg-type]
    new = state.donate(
        "optimizer_step",
        **advanced, scale=scale, attempted_steps=state.attempted_steps + 1, batch=state.batch + 1,
        _grads=None, _old_buffers=None,
    )  # fmt: skip
    if finite is False and new.nonfinite_steps >= max_nonfinite_steps:
        check_nonfinite(new, max_nonfinite_steps, first_nonfinite(state))
    return new


def _copied(state: TrainState) -> TrainState:
    try:
        return state.clone()
    except (RuntimeError, MemoryError) as error:
        if not did_not_fit(error):
            raise
        raise OutOfMemoryError(
            f"A copy of the state did not fit into the memory of {state.device}. The state is as it was. "
            "optimizer_step(state) needs no copy: it updates in place."
        ) from error


def first_nonfinite(state: TrainState) -> str:
    """The name of the first parameter whose gradient is not finite; for messages."""
    values = [] if state._grads is None else state._grads.values
    for index, grad in enumerate(values):
        if grad is not None and not torch.isfinite(grad).all():
            return state._machine.trainable[index]
    return "none (their norm overflows float32)"


def check_nonfinite(state: TrainState, limit: int, culprit: str) -> None:
    """Raise NonFiniteError if as many steps in a row were not finite."""
    count = int(state.nonfinite_steps)
    if count >= limit:
        scale = "" if state.scale is None else f", loss scale {float(state.scale.scale):g}"
        raise NonFiniteError(
            f"{count} steps in a row had gradients that were not finite (limit {limit}), up to attempted step "
            f"{state.attempted_steps - 1}{scale}. The first gradient that is not finite: {culprit}. The parameters are those "
            "of the last finite step. Lower the learning rate, clip, or look for a division or logarithm of 0 in the loss."
        )


def _run_optimizer(state: TrainState) -> dict[str, dict[str, Any]]:
    """Update the state's own tensors in place; the slots afterwards."""
    machine = state._machine
    # the first step makes the slots, which is where memory runs out: if nothing else was done, it can be undone
    first = type(state.applied_steps) is int and state.applied_steps == 0 and not any(state._slots.values())
    versions = [leaf._version for leaf in state._leaves] if first else None
    before = machine.point_optimizer(state._lease, state._params, state._slots, state.hyper)
    try:
        machine.step(state._leaves, state._grads.values, state.loss)  # type: ignore[union-attr]  # checked by the caller
        if machine.replaces_slots:
            return {name: machine.optimizer.state[state._params[name]] for name in machine.trainable}
    except BaseException as error:
        if trace_of(state) is None:
            _after_failure(state, error, versions)
        raise
    finally:
        machine.put_back(before)
    return state._slots


def _after_failure(state: TrainState, error: BaseException, versions: list[int] | None) -> None:
    """Undo an update that failed before it changed a parameter, or spend the state, which may be half updated.

    Args:
        state: whose update failed.
        error: why; running out of memory is raised again as an error of ours.
        versions: of the parameters before the first update of a run; None for a later one, which cannot be undone.
    """
    machine = state._machine
    whole = not machine.replaces_slots and versions == [leaf._version for leaf in state._leaves]
    if whole:
        for slot in state._slots.values():
            slot.clear()
    else:
        state._lease.tear()
    if did_not_fit(error):
        left = "The state is as it was." if whole else "It was cut off half-way: this state is spent."
        raise OutOfMemoryError(
            f"The update of {type(machine.optimizer).__name__} did not fit into the memory of {machine.device}. {left} Take an "
            "optimizer that keeps less for each parameter, or freeze some; optimizer_step(state, donate=False) leaves the "
            "state whole in any case, for the memory of a copy."
        ) from error


def _decided(state: TrainState, *, finite: bool) -> dict[str, Any]:
    """What a step changes where the host knows whether it is finite."""
    if finite:
        return {
            "_slots": _run_optimizer(state),
            "applied_steps": state.applied_steps + 1,
            "nonfinite_steps": 0,
            "finite": True,
        }
    old = state._buffers if state._old_buffers is None else state._old_buffers
    return {"_buffers": old, "nonfinite_steps": state.nonfinite_steps + 1, "finite": False}


def _counts_and_buffers(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """The same without a decision on the host: counters move by a tensor, buffers are selected."""
    old = state._old_buffers or state._buffers
    ones = finite.long()
    known = (
        {}
        if isinstance(state.applied_steps, Tensor)
        else {"_known": (state.applied_steps, state.attempted_steps)}
    )
    return {
        **known,
        "applied_steps": state.applied_steps + ones,
        "nonfinite_steps": (state.nonfinite_steps + 1) * (1 - ones),
        "_buffers": {name: torch.where(finite, b, old[name]) for name, b in state._buffers.items()},
        "finite": finite,
    }


def _decided_by_fused_optimizer(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """A fused optimizer reads ``found_inf`` in its own kernel, and changes nothing where it is 1."""
    optimizer: Any = state._machine.optimizer
    new = [name for name, slot in state._slots.items() if not slot]
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        slots = _run_optimizer(state)
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    for name in new:
        for value in slots[name].values():
            if isinstance(value, Tensor):
                # a skipped kernel leaves a new momentum buffer as it was made: memory that nobody wrote
                value.copy_(torch.where(finite, value, torch.zeros_like(value)))
    return {"_slots": slots, **_counts_and_buffers(state, finite)}


def _selected(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """Step, then take the old values back where the step was not finite: for a step that is being traced."""
    old_params = {name: p.detach().clone() for name, p in state._params.items()}
    old_slots = {name: map_tensors(Tensor.clone, slot) for name, slot in state._slots.items()}
    slots = _run_optimizer(state)
    with torch.no_grad():
        for name in state._machine.trainable:
            leaf = state._params[name]
            leaf.copy_(torch.where(finite, leaf, old_params[name]))
            for key, value in slots[name].items():
                if isinstance(value, Tensor):
                    value.copy_(torch.where(finite, value, old_slots[name][key]))
    return {"_slots": slots, **_counts_and_buffers(state, finite)}
