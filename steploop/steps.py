"""The pure functions that a training step is made of: forward, backward, unscale and clip, optimizer step.

Each takes a state and gives the next one; ``schedule`` stands in ``steploop.scheduling`` and ``evaluate`` in
``steploop.evaluation``. A train step is written out of them, in this order::

    def train_step(state, batch):
        state = forward_loss(state, batch, objective)
        state = backward_scaled(state)
        state = unscale_and_clip(state, max_norm=1.0)
        state = optimizer_step(state)
        return schedule(state, learning_rate)
"""

import math
from typing import Any

import torch
from torch import Tensor

from steploop.clip import check_bound, clip_adaptive, clip_norm, clip_value, global_norm
from steploop.errors import ConfigError, NonFiniteError, SpentStateError, StepOrderError
from steploop.forwarding import Objective, forward, translated
from steploop.precision import on_host
from steploop.shielding import shielded
from steploop.state import Gradients, TrainState
from steploop.trees import map_tensors

__all__ = ["backward_scaled", "forward_loss", "optimizer_step", "unscale_and_clip"]


@shielded
def forward_loss(state: TrainState, batch: Any, objective: Objective) -> TrainState:
    """Compute the loss of a batch, in training mode and in the state's precision.

    Everything random in the forward pass is a function of (seed, attempted_steps); the global generators are
    left where they were. Does not depend on the caller's grad mode, autocast, default dtype or on the mode the
    model was left in.

    Args:
        state: any living state.
        batch: whatever the objective takes; on the state's device.
        objective: ``objective(model, batch)`` gives ``loss``, ``(loss, outputs)`` or ``(loss, outputs, weight)``:
            the loss of shape () is a mean over ``weight`` samples or tokens; ``outputs`` is for metrics.

    Returns:
        The state with ``loss`` (shape (), detached), ``outputs`` (detached), and the buffers after this pass.

    Raises:
        ObjectiveError: what the objective returned cannot be trained on.
        OutOfMemoryError: the pass did not fit; ``state`` is intact.
        SpentStateError: ``state`` was given away.
    """
    state.check_alive("forward_loss")
    loss, outputs, _, buffers = forward(state, batch, objective)
    return state.replace(
        loss=loss.detach(), outputs=outputs, _graph=loss, _buffers=buffers, _old_buffers=state._buffers,
        _grads=None, grad_norm=None, clipped_norm=None, finite=None,
    )  # fmt: skip


@shielded
def backward_scaled(state: TrainState) -> TrainState:
    """Compute the gradients of the loss times the loss scale.

    With L the loss, S the loss scale (1 without one) and w the parameters: grads = ∂(S L) / ∂w.

    The graph of the loss is used up: once per loss. ``.grad`` of every parameter is None afterwards.

    Returns:
        The state with ``grads``, one tensor of the parameter's shape for each parameter that the loss depends on.

    Raises:
        StepOrderError: there is no loss: ``forward_loss`` comes before.
        SpentStateError: the graph of this loss was used up, or ``state`` was given away.
    """
    state.check_alive("backward_scaled")
    graph = state._graph
    if graph is None:
        raise StepOrderError("backward_scaled: this state has no loss to differentiate. Call forward_loss(state, batch, objective) before.")
    grads = gradients(state, graph, seed_of(state, graph))
    return state.replace(_graph=None, _grads=Gradients(grads))


def seed_of(state: TrainState, loss: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """What ``loss`` is differentiated with: the loss scale times ``weight``, of the loss's dtype and shape ()."""
    scale = 1.0 if state.scale is None else state.scale.scale
    factor = scale * weight
    if isinstance(factor, Tensor):
        return factor.to(loss.dtype)
    return torch.full((), factor, dtype=loss.dtype, device=loss.device)


def gradients(state: TrainState, loss: Tensor, seed: Tensor, *, keep: bool = False, take: bool = True) -> list[Tensor | None]:
    """Run the backward pass and take every ``.grad`` away.

    Args:
        state: whose parameters the loss was computed from.
        loss: shape (), with its graph.
        seed: what it is differentiated with, of its dtype.
        keep: add to the gradients of the pass before, instead of beginning anew.
        take: False leaves them for the next pass to add to, and returns nothing.
    """
    leaves = state._leaves
    if not keep:
        for leaf in leaves:
            if leaf.grad is not None:  # somebody's leftover would be added to ours
                leaf.grad = None
    try:
        torch.autograd.backward(loss, seed)
    except (RuntimeError, MemoryError) as error:
        for leaf in leaves:
            leaf.grad = None
        if "backward through the graph a second time" in str(error):
            raise SpentStateError(
                "backward_scaled: the graph of this loss was used up by another backward pass. Call forward_loss again."
            ) from error
        raise translated(error, state._machine, None) from error
    if not take:
        return []
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


@shielded
def unscale_and_clip(
    state: TrainState, *, max_norm: float | None = None, max_value: float | None = None, adaptive: float | None = None
) -> TrainState:
    """Divide the gradients by the loss scale, then bound them in one of three ways.

    With g all gradients as one flat vector, S the loss scale and u = g / S:

        max_norm:   clipped = u * min(1, max_norm / (||u|| + 1e-6))
        max_value:  clipped = min(max(u, -max_value), max_value), for every entry
        adaptive:   clipped = u * min(1, adaptive * max(||w||, 1e-3) / ||u||), for every output unit w

    Gradients that are not finite are not rescaled: ``optimizer_step`` sees ``finite`` and skips. A norm that
    overflows float32 counts as not finite (torch would multiply all gradients by 0).

    Works on the gradients in place: those of the state that went in are spent.

    Args:
        state: holds ``grads``, one tensor per parameter, of its shape.
        max_norm: bound on ||clipped||, in units of the *unscaled* gradient. ``inf`` measures and clips nothing.
        max_value: bound on every |entry|, in the same units.
        adaptive: bound on the ratio of gradient norm to weight norm of each output unit, typically 0.01 to 0.2.

    Returns:
        The state with true ``grads``, ``grad_norm`` (shape (), before clipping), ``clipped_norm`` and ``finite``.

    Raises:
        ConfigError: not exactly one bound was given, or it is not > 0.
        StepOrderError: there are no gradients (``backward_scaled`` comes before), or they are unscaled already.

    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063, with the 1e-6 of
    ``torch.nn.utils.clip_grad_norm_``; Brock et al. 2021, https://arxiv.org/abs/2102.06171.
    """
    state.check_alive("unscale_and_clip")
    bound = _one_bound(max_norm, max_value, adaptive)
    flight = state._grads
    if flight is None:
        raise StepOrderError("unscale_and_clip: this state has no gradients. Call backward_scaled(state) before.")
    if state.grad_norm is not None:
        raise StepOrderError("unscale_and_clip: these gradients are unscaled and clipped already. Call it once, after backward_scaled.")
    if flight.taken_by is not None:
        raise SpentStateError(f"unscale_and_clip: the gradients of this state were given to {flight.taken_by} already.")
    flight.taken_by = "unscale_and_clip"
    values = flight.values
    grads = [g for g in values if g is not None]
    with torch.no_grad():
        if state.scale is not None:
            _multiply(grads, state.scale.inverse())
        norm = global_norm(grads)
        clipped: float | Tensor
        if bound == "max_norm":
            clipped = clip_norm(grads, norm, max_norm)  # type: ignore[arg-type]  # it is the one that was given
        else:
            if bound == "max_value":
                clip_value(grads, max_value)  # type: ignore[arg-type]  # likewise
            else:
                pairs = zip(values, state._leaves, strict=True)
                clip_adaptive(grads, [leaf for g, leaf in pairs if g is not None], adaptive)  # type: ignore[arg-type]
            clipped = global_norm(grads)
        finite = math.isfinite(norm.item()) if on_host(norm) else torch.isfinite(norm)
    return state.replace(_grads=Gradients(values), grad_norm=norm, clipped_norm=clipped, finite=finite)


def _one_bound(max_norm: float | None, max_value: float | None, adaptive: float | None) -> str:
    given = [(k, v) for k, v in (("max_norm", max_norm), ("max_value", max_value), ("adaptive", adaptive)) if v is not None]
    if len(given) != 1:
        names = ", ".join(name for name, _ in given) or "none"
        raise ConfigError(
            f"unscale_and_clip: give exactly one of max_norm, max_value and adaptive, but got {names}. "
            "max_norm=float('inf') measures the norm and clips nothing."
        )
    name, value = given[0]
    check_bound(f"unscale_and_clip: {name}", value)
    return name


def _multiply(grads: list[Tensor], factor: float | Tensor) -> None:
    if grads and (isinstance(factor, Tensor) or factor != 1.0):
        torch._foreach_mul_(grads, factor)


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
    """
    state.check_alive("optimizer_step")
    if state.grad_norm is None or state._grads is None:
        before = "backward_scaled and then unscale_and_clip" if state._grads is None else "unscale_and_clip"
        raise StepOrderError(f"optimizer_step: this state has no unscaled gradients. Call {before} before.")
    finite = state.finite
    if isinstance(finite, Tensor) and type(finite) is Tensor and not state._machine.fused:
        finite = bool(finite.item())  # waits for the device: this optimizer cannot skip by itself
    if not donate:
        state = state.clone()
    if isinstance(finite, bool):
        advanced = _decided(state, finite=finite)
    elif type(finite) is Tensor:
        advanced = _decided_by_fused_optimizer(state, finite)
    else:
        advanced = _selected(state, finite)  # type: ignore[arg-type]  # a tensor that is being traced
    scale = None if state.scale is None else state.scale.updated(finite)  # type: ignore[arg-type]
    new = state.donate(
        f"optimizer_step at attempted step {state.attempted_steps}",
        **advanced, scale=scale, attempted_steps=state.attempted_steps + 1, batch=state.batch + 1,
        _grads=None, _old_buffers=None,
    )  # fmt: skip
    if finite is False and new.nonfinite_steps >= max_nonfinite_steps:
        check_nonfinite(new, max_nonfinite_steps, first_nonfinite(state))
    return new


def first_nonfinite(state: TrainState) -> str:
    """The name of the first parameter whose gradient is not finite; for messages."""
    values = [] if state._grads is None else state._grads.values
    for name, grad in zip(state._machine.trainable, values, strict=False):
        if grad is not None and not torch.isfinite(grad).all():
            return name
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
    before = machine.point_optimizer(state._lease, state._params, state._slots, state.hyper)
    try:
        machine.step(state._leaves, state._grads.values, state.loss)  # type: ignore[union-attr]  # checked by the caller
        if machine.replaces_slots:
            return {name: machine.optimizer.state[leaf] for name, leaf in zip(machine.trainable, state._leaves, strict=True)}
        return state._slots
    finally:
        machine.put_back(before)


def _decided(state: TrainState, *, finite: bool) -> dict[str, Any]:
    """What a step changes where the host knows whether it is finite."""
    if finite:
        return {"_slots": _run_optimizer(state), "applied_steps": state.applied_steps + 1, "nonfinite_steps": 0, "finite": True}
    old = state._buffers if state._old_buffers is None else state._old_buffers
    return {"_buffers": old, "nonfinite_steps": state.nonfinite_steps + 1, "finite": False}


def _counts_and_buffers(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """The same without a decision on the host: counters move by a tensor, buffers are selected."""
    old = state._old_buffers or state._buffers
    ones = finite.long()
    known = {} if isinstance(state.applied_steps, Tensor) else {"_known": (state.applied_steps, state.attempted_steps)}
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
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        slots = _run_optimizer(state)
    finally:
        del optimizer.grad_scale, optimizer.found_inf
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
