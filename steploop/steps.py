"""The first three functions of a training step: forward, backward, unscale and clip.

Each takes a state and gives the next one. ``optimizer_step`` stands in ``steploop.updating``, ``schedule`` in
``steploop.scheduling``, ``evaluate`` in ``steploop.evaluation``. A train step is written out of them, in this order::

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
from steploop.differentiation import gradients, seed_of
from steploop.errors import ConfigError, SpentStateError, StepOrderError
from steploop.forwarding import Objective, TrainingPasses
from steploop.precision import on_host
from steploop.shielding import shielded
from steploop.state import Gradients, TrainState

__all__ = ["backward_scaled", "forward_loss", "unscale_and_clip"]


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
    with TrainingPasses(state) as passes:
        loss, outputs, _ = passes.run(batch, objective)
        buffers = passes.buffers()
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
        raise StepOrderError(
            "backward_scaled: this state has no loss to differentiate. Call forward_loss(state, batch, objective) before."
        )
    # activation checkpointing computes parts of the forward pass again: with this state's parameters
    module = state._machine.module
    before = module.point(state._lease, state._params)
    try:
        grads = gradients(state, graph, seed_of(state, graph))
    finally:
        if before is not None:
            module.place_params(before)
    return state.replace(_graph=None, _grads=Gradients(grads))


@shielded
def unscale_and_clip(
    state: TrainState,
    *,
    max_norm: float | None = None,
    max_value: float | None = None,
    adaptive: float | None = None,
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
        raise StepOrderError(
            "unscale_and_clip: this state has no gradients. Call backward_scaled(state) before."
        )
    if state.grad_norm is not None:
        raise StepOrderError(
            "unscale_and_clip: these gradients are unscaled and clipped already. Call it once, after backward_scaled."
        )
    if flight.taken_by is not None:
        raise SpentStateError(
            f"unscale_and_clip: the gradients of this state were given to {flight.taken_by} already."
        )
    flight.taken_by = "unscale_and_clip"
    values = flight.values
    grads = [g for g in values if g is not None]
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
    finite: bool | Tensor
    if isinstance(clipped, float):  # the norm was read, and what is clipped is finite if it was
        finite = math.isfinite(clipped)
    else:
        finite = math.isfinite(norm.item()) if on_host(norm) else torch.isfinite(norm)
    return state.replace(_grads=Gradients(values), grad_norm=norm, clipped_norm=clipped, finite=finite)


def _one_bound(max_norm: float | None, max_value: float | None, adaptive: float | None) -> str:
    given = [
        (k, v)
        for k, v in (("max_norm", max_norm), ("max_value", max_value), ("adaptive", adaptive))
        if v is not None
    ]
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
