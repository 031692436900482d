"""One backward pass: what a loss is differentiated with, and the gradients taken off the parameters as values."""

from collections.abc import Callable

import torch
from torch import Tensor

from steploop.core.state.parts import TensorValues
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import drop_leftovers, require_traceable
from steploop.core.steps.pass_failures import translated
from steploop.core.trees import first_difference
from steploop.errors import ConfigError, ObjectiveError, SpentStateError

try:
    # What torch.autograd.backward calls when it has looked at its arguments. Of a scalar loss and a seed that are ours
    # all of that is known, and it costs 7% of the forward and backward pass of a small perceptron.
    from torch._C import _are_functorch_transforms_active as _transforms_active
    from torch.autograd.graph import _engine_run_backward

    # It leaves its caller's context for the threads of other devices, and looks whether torch logs its graphs: on a CPU
    # the backward pass runs in the thread that calls it.
    _run_on_cpu = torch.autograd.Variable._execution_engine.run_backward
except (ImportError, AttributeError):  # all are private, and may go: nothing but the time depends on them
    _engine_run_backward = _run_on_cpu = None  # type: ignore[assignment]

__all__ = ["gradients", "recomputed", "require_some", "seed_of", "take_gradients"]


def seed_of(state: TrainState, loss: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """What ``loss`` is differentiated with: the loss scale times ``weight``, of the loss's dtype and shape ()."""
    factor = weight if state.scale is None else state.scale.scale * weight
    if isinstance(factor, Tensor):
        return factor.to(loss.dtype)
    if type(loss) is not Tensor:  # it is being traced: nothing of the trace may outlive it
        return torch.full((), factor, dtype=loss.dtype, device=loss.device)
    # a tensor a step is 2 us: the factor of the step before is nearly always the same
    seeds = state.machine.seeds
    key = (factor, loss.dtype)
    if key not in seeds:
        seeds.clear()
        seeds[key] = torch.full((), factor, dtype=loss.dtype, device=loss.device)
    return seeds[key]


def gradients(
    state: TrainState,
    loss: Tensor,
    seed: Tensor,
    *,
    keep: bool = False,
    take: bool = True,
    keep_graph: bool = False,
) -> list[Tensor | None]:
    """Run the backward pass and take every ``.grad`` away.

    Args:
        state: whose parameters the loss was computed from.
        loss: shape (), with its graph.
        seed: what it is differentiated with, of its dtype.
        keep: add to the gradients of the pass before, instead of beginning anew.
        take: False leaves them for the next pass to add to, and returns nothing.
        keep_graph: keep the graph for another backward pass.
    """
    leaves = state.tensors.leaves
    if not keep:
        drop_leftovers(leaves)
    try:
        _backward(loss, seed, keep_graph=keep_graph)
    except (RuntimeError, MemoryError) as error:
        for leaf in leaves:
            leaf.grad = None
        if "backward through the graph a second time" in str(error):
            raise SpentStateError(
                "backward_scaled: the graph of this loss was used up by another backward pass. Call forward_loss again."
            ) from error
        if (ours := translated(error, state.machine, None)) is None:
            raise
        raise ours from error
    return take_gradients(state) if take else []


def take_gradients(state: TrainState) -> list[Tensor | None]:
    """The gradient of each trainable parameter; ``.grad`` is None afterwards."""
    leaves = state.tensors.leaves
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return grads


def _backward(loss: Tensor, seed: Tensor, *, keep_graph: bool) -> None:
    """``torch.autograd.backward(loss, seed)``; of a traced loss, and under torch.func, where that is an error, itself."""
    if type(loss) is not Tensor or _engine_run_backward is None or _transforms_active():
        torch.autograd.backward(loss, seed, retain_graph=keep_graph)
        return
    run = _run_on_cpu if loss.is_cpu else _engine_run_backward
    run((loss,), (seed,), keep_graph=keep_graph, create_graph=False, accumulate_grad=True)


def require_some(grads: list[Tensor | None]) -> None:
    """Raise ObjectiveError if no parameter of the state has a gradient."""
    for grad in grads:
        if grad is not None:
            return
    raise ObjectiveError(
        "No parameter of the state got a gradient: the loss depends on other tensors than the state's. Let the objective "
        "compute with the model that it is given, objective(model, batch), and with no other copy of it."
    )


def recomputed(
    state: TrainState, run: Callable[[], list[Tensor | None]]
) -> tuple[TensorValues, list[Tensor | None]]:
    """Run a backward pass that may compute parts of the forward pass again, with this state's parameters and buffers.

    Returns:
        The state's values afterwards, and what ``run`` gave. Recomputed BatchNorm layers count a batch twice, as in any
        loop with activation checkpointing. Attributes that a hook or a recomputed layer has changed are among the values.
    """
    module, tensors = state.machine.module, state.tensors
    before = module.point(state.lease, tensors.params, checked=True)
    buffers = None if before is None else module.buffers()
    looks = module.looks_at_backward() if trace_of(state) is None else module.extra_in_backward
    try:
        if looks:
            return _with_extra_state(state, run)
        if tensors.buffers:
            return _with_buffers(state, run)
        return tensors, run()
    finally:
        if before is not None:
            module.place_params(before)
            module.place_buffers(buffers or {})


def _with_extra_state(
    state: TrainState, run: Callable[[], list[Tensor | None]]
) -> tuple[TensorValues, list[Tensor | None]]:
    """What a backward pass changes besides buffers: attributes of layers, and what ``get_extra_state`` gives."""
    module, before, traced = state.machine.module, state.tensors.extra, trace_of(state) is not None
    if first_difference(before, module.extra_state()) is not None:  # a pass of another state came between
        module.set_extra_state(before)
    seen = None if traced else module.attributes.seen()
    tensors, grads = _with_buffers(state, run) if state.tensors.buffers else (state.tensors, run())
    if seen is not None:
        module.learn_from_backward(seen, before)
    if not module.extra_in_backward:
        return tensors, grads
    if state.machine.ranks is not None:
        raise ConfigError(
            "backward_scaled: the model changes an attribute of a layer in its backward pass, in a hook for instance, which the "
            "parts of a batch would each do their own way. Keep it in a buffer (register_buffer), or train without ranks."
        )
    extra = module.extra_state()
    if traced:
        require_traceable(before, extra)
    return tensors.replace(extra=extra), grads


def _with_buffers(
    state: TrainState, run: Callable[[], list[Tensor | None]]
) -> tuple[TensorValues, list[Tensor | None]]:
    """Whether a backward pass writes into buffers is found out in the first one, on copies."""
    module, machine, tensors = state.machine.module, state.machine, state.tensors
    if machine.recomputes is False:
        if not module.holds_buffers(tensors.buffers):
            module.place_buffers(tensors.buffers)
        return tensors, run()
    copies = {name: b.clone() for name, b in tensors.buffers.items()}
    versions = [b._version for b in copies.values()]
    module.place_buffers(copies)
    try:
        grads = run()
        found = module.buffers()
    finally:
        module.place_buffers(tensors.buffers)
    written = versions != [b._version for b in copies.values()] or any(
        found.get(n) is not b for n, b in copies.items()
    )
    if machine.recomputes is None and trace_of(state) is None:
        machine.recomputes = written
    if not written:
        return tensors, grads
    module.place_buffers(found)
    return tensors.replace(buffers=found), grads
