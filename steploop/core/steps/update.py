"""``optimizer_step``: updates parameters, slots and loss scale, or skips; decided on the host, on the device, or traced."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.state.parts import TensorValues
from steploop.core.state.sharded import local_part
from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.closure import Evaluations
from steploop.core.steps.optimizer_run import run_optimizer
from steploop.core.steps.pass_failures import did_not_fit
from steploop.core.steps.selection import decided_by_fused_optimizer, selected
from steploop.errors import CompileError, ConfigError, NonFiniteError, OutOfMemoryError, StepOrderError

__all__ = ["check_nonfinite", "first_nonfinite", "optimizer_step"]


@shielded
def optimizer_step(
    state: TrainState,
    *,
    closure: Callable[[TrainState], TrainState] | None = None,
    donate: bool = True,
    max_nonfinite_steps: int = 100,
) -> TrainState:
    """Update parameters, optimizer slots and loss scale; or skip, if a gradient was not finite.

    A step that is not finite changes neither parameters nor slots nor buffers: it is counted, and backs the loss
    scale off. Both kinds advance ``attempted_steps`` and the cursor; only a taken one advances ``applied_steps``.

    Whether to skip is decided on the CPU for nothing. On a GPU it costs no wait with a fused optimizer
    (``Optimizer(torch.optim.AdamW, fused=True)``) or in a compiled step, and one read of the device otherwise.

    Args:
        state: holds unscaled gradients; with a closure it need not.
        closure: for an optimizer that evaluates the loss itself (LBFGS, SAM): a function ``state -> state with
            gradients``, made of ``forward_loss``, ``backward_scaled`` and, if you like, ``unscale_and_clip``. It is called
            with a state that has the parameters of the moment.
        donate: update in place and spend ``state``, at no cost of memory. False copies first and leaves ``state``
            whole and usable: the pure form.
        max_nonfinite_steps: this many steps in a row that are not finite raise; on a device the run looks at the
            count whenever it reads the metrics.

    Returns:
        The state after the step, without gradients.

    Raises:
        StepOrderError: there are no unscaled gradients: ``unscale_and_clip`` comes before.
        ConfigError: the optimizer needs a closure and got none, or its first step made what no state can hold.
        NonFiniteError: ``max_nonfinite_steps`` in a row; names the first gradient that was not finite. Its ``state`` is the
            one after this step, from which a loop may go on.
        OutOfMemoryError: the update did not fit. ``state`` is intact if it was the first one, which makes the slots, and
            nothing was updated yet; otherwise it is spent, unless ``donate=False``.

    Example:
        >>> def gradients(state):
        ...     return backward_scaled(forward_loss(state, torch.ones(4, 2), lambda model, x: model(x).square().mean()))
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.LBFGS, lr=0.1))
        >>> optimizer_step(state, closure=gradients).step
        1
    """
    state.check_alive("optimizer_step")
    machine, flight = state.machine, state.flight
    if closure is None:
        _require_gradients(state)
    if not donate:
        state = _copied(state)
        flight = state.flight
    evaluations = None
    if closure is not None:
        if trace_of(state) is not None:
            raise CompileError(
                f"lets {machine.optimizer_name} evaluate the loss again (optimizer_step(closure=...)), which no graph does: how often "
                "is decided by values. Run this step in eager."
            )
        evaluations = Evaluations(state, closure)
        state = evaluations.first()
        flight = state.flight
    finite = flight.finite
    if (
        isinstance(finite, Tensor)
        and type(finite) is Tensor
        and (not machine.fused or _host_must_know(state))
    ):
        finite = bool(finite.item())  # waits for the device: this optimizer cannot skip by itself
    if isinstance(finite, bool):
        advanced = _decided(state, evaluations, finite=finite)
    elif type(finite) is Tensor:
        advanced = decided_by_fused_optimizer(state, finite)
    else:
        if (trace := trace_of(state)) is not None:
            trace.limit_nonfinite(state, max_nonfinite_steps)
        advanced = selected(state, finite)  # type: ignore[arg-type]  # a tensor that is being traced
    last = flight if evaluations is None else evaluations.last.flight
    known, finite = advanced.pop("known", last.known), advanced.pop("finite", finite)
    advanced |= {
        "scale": None if state.scale is None else state.scale.updated(finite),
        "attempted_steps": state.attempted_steps + 1,
        "batch": state.batch + 1,
        "flight": flight.ended(finite=finite, known=known),
        "generation": state.lease.hand_on("optimizer_step"),
    }
    new = state.over(state.__dict__ | advanced)
    if finite is False and new.nonfinite_steps >= max_nonfinite_steps:
        check_nonfinite(
            new, max_nonfinite_steps, first_nonfinite(state if evaluations is None else evaluations.last)
        )
    return new


def _require_gradients(state: TrainState) -> None:
    machine, flight = state.machine, state.flight
    if machine.needs_closure:
        raise ConfigError(
            f"optimizer_step: {type(machine.optimizer).__name__} evaluates the loss itself, several times in a step. Give it a "
            "function that does so: optimizer_step(state, closure=lambda state: backward_scaled(forward_loss(state, batch, "
            "objective)))."
        )
    if flight.grad_norm is None or flight.grads is None:
        before = "backward_scaled and then unscale_and_clip" if flight.grads is None else "unscale_and_clip"
        raise StepOrderError(f"optimizer_step: this state has no unscaled gradients. Call {before} before.")


def _host_must_know(state: TrainState) -> bool:
    """Whether a skip has to bring back what no selection on the device can: a module's extra state, moved parameters."""
    return bool(state.tensors.extra or state.machine.moved)


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
    grads = state.flight.grads
    places = enumerate([] if grads is None else grads.values)
    first = next((i for i, g in places if g is not None and not torch.isfinite(local_part(g)).all()), None)
    if state.machine.module.sharded is not None:  # it may be in the part of another rank; all of them ask
        ranks = cast("Ranks", state.machine.ranks)
        first = min((i for i in ranks.gather_objects(first) if i is not None), default=None)
    return "none (their norm overflows float32)" if first is None else state.machine.trainable[first]


def check_nonfinite(state: TrainState, limit: int, culprit: str) -> None:
    """Raise NonFiniteError if as many steps in a row were not finite."""
    count = int(state.nonfinite_steps)
    if count >= limit:
        scale = "" if state.scale is None else f", loss scale {float(state.scale.scale):g}"
        steps = "1 step" if count == 1 else f"{count} steps in a row"
        raise NonFiniteError(
            f"{steps} had gradients that were not finite (limit {limit}), up to attempted step {state.attempted_steps}{scale}. "
            f"The first gradient that is not finite: {culprit}. The parameters are those of the last finite step. Lower the "
            "learning rate, clip, or look for a division or logarithm of 0 in the loss.",
            state=state,
        )


def _decided(state: TrainState, evaluations: Evaluations | None, *, finite: bool) -> dict[str, Any]:
    """What a step changes where the host knows whether it is finite."""
    if not finite:
        state.lease.tear()
        return {"tensors": _as_it_began(state), "nonfinite_steps": state.nonfinite_steps + 1}
    changed = run_optimizer(state, evaluations)
    if evaluations is not None and evaluations.spoiled(changed["tensors"]):
        slots, beside, hyper = evaluations.undo(state)
        return {
            "tensors": _as_it_began(state).replace(slots=slots, beside=beside),
            "hyper": hyper,
            "finite": False,
            "nonfinite_steps": state.nonfinite_steps + 1,
        }
    changed["applied_steps"], changed["nonfinite_steps"] = state.applied_steps + 1, 0
    return changed


def _as_it_began(state: TrainState) -> TensorValues:
    """The values that the step began with, for one that is skipped: forward passes have moved some."""
    began = state.flight.began
    if began is None:
        return state.tensors
    with torch.no_grad():
        for name, value in began.overwritten.items():
            state.tensors.params[name].copy_(value)
    return began.tensors
