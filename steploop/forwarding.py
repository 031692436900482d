"""One call of an objective on a state's values, shielded from whatever the caller's surroundings are."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steploop.errors import ObjectiveError, OutOfMemoryError, SteploopError
from steploop.machine import Machine
from steploop.precision import Precision, autocast
from steploop.random_numbers import fold_in
from steploop.state import TrainState
from steploop.traced import TracedCount
from steploop.trees import map_tensors, shapes

__all__ = ["Objective", "SeededGenerators", "forward", "read_objective", "surroundings", "translated"]

# objective(model, batch) -> loss | (loss, outputs) | (loss, outputs, weight)
Objective = Callable[[nn.Module, Any], Any]

_NO_SEEDING: AbstractContextManager[None] = nullcontext()
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't allocate memory")


def generators_of(device: torch.device) -> tuple[torch.Generator, ...]:
    """The global generators that a computation on ``device`` may draw from."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return (torch.default_generator, torch.cuda.default_generators[index])
    if device.type == "mps":
        return (torch.default_generator, torch.mps._get_default_mps_generator())
    return (torch.default_generator,)


class SeededGenerators:
    """Seeds the generators that a forward pass draws from; afterwards they stand where the caller had them.

    ``torch.manual_seed`` and ``fork_rng`` cost 100 us and more a call; this costs 3.
    """

    __slots__ = ("_generators", "_seed", "_states")

    def __init__(self, machine: Machine, *coordinates: int) -> None:
        if machine.generators is None:
            machine.generators = generators_of(machine.device)
        self._generators = machine.generators
        self._seed = fold_in(*coordinates)

    def __enter__(self) -> None:
        self._states = [g.get_state() for g in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


def surroundings(machine: Machine, precision: Precision, *, grad: bool = True) -> AbstractContextManager[Any]:
    """The grad mode and the autocast that a forward pass runs under; its caller is shielded from all else."""
    if torch.is_grad_enabled() is grad:
        return autocast(precision, machine.device.type)
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(grad))
    stack.enter_context(autocast(precision, machine.device.type))
    return stack


def read_objective(result: Any) -> tuple[Tensor, Any, float | Tensor | None]:
    """(loss, outputs, weight) of what an objective returned; ObjectiveError where it is none of its three forms."""
    loss, outputs, weight = result, None, None
    if isinstance(result, tuple):
        if not 1 <= len(result) <= 3:
            raise ObjectiveError(
                f"An objective returns loss, (loss, outputs) or (loss, outputs, weight), but returned {len(result)} values."
            )
        loss, outputs, weight = (*result, None, None)[:3]
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        came = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ObjectiveError(
            f"An objective's loss must be a floating-point tensor of shape (), but is {came}. Reduce it, as with loss.mean()."
        )
    return loss, outputs, weight


def forward(
    state: TrainState, batch: Any, objective: Objective, draw: int = 0
) -> tuple[Tensor, Any, Any, dict[str, Tensor]]:
    """Run ``objective`` in training mode on the state's values.

    Args:
        state: is left as it is: the forward pass works on a copy of its buffers.
        batch: handed to the objective.
        objective: see ``forward_loss``.
        draw: tells apart several forward passes of one step; the generators are seeded from
            (seed, attempted_steps, draw).

    Returns:
        The loss with its graph, the outputs detached, the objective's weight or None, and the new buffers.
    """
    machine = state._machine
    module = machine.module
    before = module.point(state._lease, state._params)
    buffers = state._buffers
    if buffers:
        # BatchNorm updates its statistics in place: the old state keeps its own
        buffers = {name: b.clone() for name, b in buffers.items()}
        module.place_buffers(buffers)
    module.set_training(training=True)
    try:
        with (
            surroundings(machine, state.precision),
            # while a step is traced nothing is drawn: whoever runs the graph seeds before
            _NO_SEEDING
            if isinstance(state.attempted_steps, TracedCount)
            else SeededGenerators(machine, state.seed, state.attempted_steps, draw),
        ):
            loss, outputs, weight = read_objective(objective(module.model, batch))
        if buffers:
            buffers = module.buffers()
    except (RuntimeError, MemoryError, ValueError) as error:
        if (ours := translated(error, machine, batch)) is None:
            raise
        raise ours from error
    finally:
        if before is not None:
            module.place_params(before)
    if not loss.requires_grad:
        raise ObjectiveError(
            "The loss depends on no parameter that requires a gradient: it was detached, computed under torch.no_grad(), "
            "or does not use the model that the objective was given."
        )
    return loss, map_tensors(Tensor.detach, outputs), weight, buffers


def translated(error: Exception, machine: Machine, batch: Any) -> SteploopError | None:
    """Our error for the two failures of a forward or backward pass that torch's text does not explain; else None."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return OutOfMemoryError(
            f"A step did not fit into the memory of {machine.device}: the batch holds {shapes(batch)}. The state is as it "
            "was. Use smaller batches, accumulate(state, micro_batches, objective), or precision='bf16'."
        )
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return ObjectiveError(
            f"{_failing_layer(error, machine.model)} needs more than one value per channel in training, but the batch holds "
            f"{shapes(batch)}. Drop the short last batch (drop_last=True) or use larger batches."
        )
    return None


def _failing_layer(error: Exception, model: nn.Module) -> str:
    """The name of the innermost module of ``model`` that the traceback passes through."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "A BatchNorm layer", error.__traceback__
    while trace is not None:
        layer = trace.tb_frame.f_locals.get("self")
        if id(layer) in names and layer is not model:
            found = f"The layer {names[id(layer)]} ({type(layer).__name__})"
        trace = trace.tb_next
    return found
