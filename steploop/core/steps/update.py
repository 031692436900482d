"""``optimizer_step``: updates parameters, slots and loss scale, or skips; decided on the host, on the device, or traced."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.state.optimizer_state import check_slots
from steploop.core.state.parts import TensorValues, field_names
from steploop.core.state.sharded import local_part
from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.closure import Evaluations
from steploop.core.steps.forward_pass import did_not_fit, seeded_generators
from steploop.core.steps.sharded_steps import NOT_FOR_SHARDS, check_slots_of_shards
from steploop.core.trees import map_tensors, paths, with_leaves
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
        advanced = _decided_by_fused_optimizer(state, finite)
    else:
        if (trace := trace_of(state)) is not None:
            trace.limit_nonfinite(state, max_nonfinite_steps)
        advanced = _selected(state, finite)  # type: ignore[arg-type]  # a tensor that is being traced
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


def _run_optimizer(state: TrainState, evaluations: Evaluations | None = None) -> dict[str, Any]:
    """Update the state's own tensors in place; what else of the state changes."""
    machine, tensors = state.machine, state.tensors
    # the first step makes the slots, which is where memory runs out: if nothing else was done, it can be undone
    first = type(state.applied_steps) is int and state.applied_steps == 0 and not any(tensors.slots.values())
    versions = [leaf._version for leaf in tensors.leaves] if first else None
    put_back = machine.point_optimizer(state.lease, tensors, state.hyper)
    grads = state.flight.grads.values  # type: ignore[union-attr]  # checked by the caller
    try:
        state.lease.tear()
        closure = None
        if evaluations is not None:
            evaluations.keep(state)
            closure = evaluations.closure
        if machine.third_party:
            trace = trace_of(state)
            with seeded_generators(machine) if trace is None else trace.generators(state) as generators:
                # it may draw: the next place of this step
                generators.seed(state.seed, state.attempted_steps, state.flight.passes)
                machine.step(tensors.leaves, grads, closure)
        else:
            machine.step(tensors.leaves, grads, closure)
        if evaluations is not None:
            tensors = evaluations.last.tensors
        if first and machine.module.sharded is not None:
            check_slots_of_shards(state, tensors.slots)
        return _read_back(state, tensors, first=first) if machine.third_party else {"tensors": tensors}
    except BaseException as error:
        if trace_of(state) is None:
            _after_failure(state, error, versions)
        raise
    finally:
        if put_back is not None:
            put_back()


def _read_back(state: TrainState, tensors: TensorValues, *, first: bool) -> dict[str, Any]:
    """What an optimizer that is none of torch's keeps after a step, wherever it keeps it."""
    machine = state.machine
    optimizer = machine.optimizer
    slots = {name: optimizer.state.get(tensors.params[name], {}) for name in machine.trainable}
    hyper, beside = machine.read_hyper(), machine.read_beside()
    if first:
        for member in machine.members:
            check_slots(member, slots, hyper, beside)
    machine.forget_hyper()
    return {"tensors": tensors.replace(slots=slots, beside=beside), "hyper": hyper}


def _after_failure(state: TrainState, error: BaseException, versions: list[int] | None) -> None:
    """Undo an update that failed before it changed a parameter; otherwise the state is spent, half updated.

    Args:
        state: whose update failed.
        error: why; running out of memory is raised again as an error of ours.
        versions: of the parameters before the first update of a run; None for a later one, which cannot be undone.
    """
    machine = state.machine
    whole = versions == [leaf._version for leaf in state.tensors.leaves]
    if whole:
        for slot in state.tensors.slots.values():
            slot.clear()
        if state.lease.torn:
            state.lease.mend()
    if machine.third_party:
        machine.forget_hyper()
        _explain_third_party(state, error)
    if machine.module.sharded is not None and any(sign in str(error) for sign in NOT_FOR_SHARDS):
        raise ConfigError(
            f"optimizer_step: {machine.optimizer_name} cannot update sharded parameters: {str(error).splitlines()[0]} Take an optimizer "
            "that updates every value by itself, such as AdamW or SGD."
        ) from error
    if did_not_fit(error):
        left = "The state is as it was." if whole else "It was cut off half-way: this state is spent."
        raise OutOfMemoryError(
            f"The update of {type(machine.optimizer).__name__} did not fit into the memory of {machine.device}. {left} Take an "
            "optimizer that keeps less for each parameter, or freeze some; optimizer_step(state, donate=False) leaves the "
            "state whole in any case, for the memory of a copy."
        ) from error


def _explain_third_party(state: TrainState, error: BaseException) -> None:
    """Raise ConfigError for two failures of other people's optimizers whose text does not say what to do here."""
    kind, text = type(state.machine.optimizer).__name__, str(error).lower()
    if "closure" in text or "closure" in type(error).__name__.lower():
        raise ConfigError(
            f"optimizer_step: {kind} evaluates the loss itself ({error}). Give it a function that does so: "
            "optimizer_step(state, closure=lambda state: backward_scaled(forward_loss(state, batch, objective)))."
        ) from error
    if "does not require grad" in text or "create_graph" in text:
        raise ConfigError(
            f"optimizer_step: {kind} differentiates the gradients once more ({error}), but gradients here are values without a "
            "graph. Use an optimizer that needs none."
        ) from error


def _decided(state: TrainState, evaluations: Evaluations | None, *, finite: bool) -> dict[str, Any]:
    """What a step changes where the host knows whether it is finite."""
    if not finite:
        state.lease.tear()
        return {"tensors": _as_it_began(state), "nonfinite_steps": state.nonfinite_steps + 1}
    changed = _run_optimizer(state, evaluations)
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


def _counts_and_buffers(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """The same without a decision on the host: counters move by a tensor, buffers and the carry are selected."""
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


def _decided_by_fused_optimizer(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """A fused optimizer reads ``found_inf`` in its own kernel, and changes nothing where it is 1."""
    optimizer: Any = state.machine.optimizer
    changed = _counts_and_buffers(state, finite)
    new = [name for name, slot in state.tensors.slots.items() if not slot]
    optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
    try:
        slots = _run_optimizer(state)["tensors"].slots
    finally:
        del optimizer.grad_scale, optimizer.found_inf
    for name in new:
        for value in slots[name].values():
            if isinstance(value, Tensor):
                # a skipped kernel leaves a new momentum buffer as it was made: memory that no kernel wrote
                value.copy_(torch.where(finite, value, torch.zeros_like(value)))
    return {**changed, "tensors": changed["tensors"].replace(slots=slots)}


def _selected(state: TrainState, finite: Tensor) -> dict[str, Any]:
    """Step, then take the old values back where the step was not finite: for a step that is being traced."""
    tensors = state.tensors
    changed = _counts_and_buffers(state, finite)
    old_params = {name: p.detach().clone() for name, p in tensors.params.items()}
    old_slots = {name: map_tensors(Tensor.clone, slot) for name, slot in tensors.slots.items()}
    old_beside = {p: t.clone() for p, t in paths(tensors.beside) if isinstance(t, Tensor)}
    ran = _run_optimizer(state)
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
