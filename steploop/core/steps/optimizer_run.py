"""One run of the live optimizer on a state's own tensors, and what becomes of the state where it fails."""

from typing import Any

from steploop.core.state.optimizer_state import check_slots
from steploop.core.state.parts import TensorValues
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.sharded_steps import NOT_FOR_SHARDS, check_slots_of_shards
from steploop.core.steps.closure import Evaluations
from steploop.core.steps.forward_pass import seeded_generators
from steploop.core.steps.pass_failures import did_not_fit
from steploop.errors import ConfigError, OutOfMemoryError

__all__ = ["run_optimizer"]


def run_optimizer(state: TrainState, evaluations: Evaluations | None = None) -> dict[str, Any]:
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
