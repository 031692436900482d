"""One call of an objective on a state's values, shielded from whatever the caller's surroundings are."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from steploop.core.precision import Precision, autocast
from steploop.core.seeds import fold_in
from steploop.core.state.machine import Machine
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.trees import map_tensors, shapes
from steploop.errors import ObjectiveError, OutOfMemoryError, SteploopError

__all__ = [
    "Objective",
    "SeededGenerators",
    "TrainingPasses",
    "did_not_fit",
    "read_objective",
    "surroundings",
    "translated",
]

# objective(model, batch) -> loss | (loss, outputs) | (loss, outputs, weight)
Objective = Callable[[nn.Module, Any], Any]

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
    """Seeds the generators that a computation draws from; afterwards they stand where the caller had them."""

    __slots__ = ("_generators", "_kept", "_seed")

    def __init__(self, machine: Machine, *coordinates: int) -> None:
        if machine.generators is None:
            machine.generators = generators_of(machine.device)
        self._generators = machine.generators
        self._seed = fold_in(*coordinates)

    def __enter__(self) -> None:
        self._kept = [(generator, generator.get_state()) for generator in self._generators]
        for generator in self._generators:
            generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        for generator, kept in self._kept:
            generator.set_state(kept)


def surroundings(machine: Machine, precision: Precision, *, grad: bool = True) -> AbstractContextManager[Any]:
    """The grad mode and the autocast that a forward pass runs under; its caller is shielded from all else."""
    if torch.is_grad_enabled() is grad:
        return autocast(precision, machine.device_type)
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(grad))
    stack.enter_context(autocast(precision, machine.device_type))
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


class TrainingPasses:
    """Forward passes in training mode on a state's values; the module and the generators are put back on leaving.

    The state is left as it is: the passes work on a copy of its buffers. Several passes of one step go on from each
    other's buffers, and are told apart by ``draw``: the generators are seeded from (seed, attempted_steps, draw).

    Saving and restoring a generator costs 1 us, where ``torch.random.fork_rng`` costs 100 and more.
    """

    __slots__ = ("_before", "_buffers", "_generators", "_kept", "_machine", "_state")

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._machine = machine = state._machine
        if machine.generators is None:
            machine.generators = generators_of(machine.device)
        # while a step is traced nothing is drawn: whoever runs the graph seeds before
        self._generators = machine.generators if trace_of(state) is None else ()

    def __enter__(self) -> Self:
        state, module = self._state, self._machine.module
        self._kept = [(generator, generator.get_state()) for generator in self._generators]
        self._before = module.point(state._lease, state._params)
        self._buffers = state._buffers
        if self._buffers:
            # BatchNorm updates its statistics in place: the old state keeps its own
            self._buffers = {name: b.clone() for name, b in self._buffers.items()}
            module.place_buffers(self._buffers)
        module.set_training(training=True)
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        for generator, kept in self._kept:
            generator.set_state(kept)
        if self._before is not None:
            self._machine.module.place_params(self._before)
        if failure is not None:
            # the parts before have left gradients, which may be what there is no room for
            for leaf in self._state._leaves:
                leaf.grad = None

    def run(self, batch: Any, objective: Objective, draw: int = 0) -> tuple[Tensor, Any, Any]:
        """The loss with its graph, the outputs detached, and the objective's weight or None."""
        state, machine = self._state, self._machine
        for generator in self._generators:
            generator.manual_seed(fold_in(state.seed, state.attempted_steps, draw))
        try:
            with surroundings(machine, state.precision):
                loss, outputs, weight = read_objective(objective(machine.model, batch))
        except (RuntimeError, MemoryError, ValueError) as error:
            if (ours := translated(error, machine, batch)) is None:
                raise
            raise ours from error
        if not loss.requires_grad:
            raise ObjectiveError(
                "The loss depends on no parameter that requires a gradient: it was detached, computed under "
                "torch.no_grad(), or does not use the model that the objective was given."
            )
        return loss, map_tensors(Tensor.detach, outputs), weight

    def buffers(self) -> dict[str, Tensor]:
        """The buffers after the passes so far: a module may have put new tensors in their places."""
        return self._machine.module.buffers()


def did_not_fit(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    text = str(error)
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


def translated(error: Exception, machine: Machine, batch: Any) -> SteploopError | None:
    """Our error for the two failures of a forward or backward pass that torch's text does not explain; else None.

    ``batch`` is None where it is not known, in a backward pass.
    """
    text = str(error)
    if did_not_fit(error):
        held = "" if batch is None else f": the batch holds {shapes(batch)}"
        return OutOfMemoryError(
            f"A step did not fit into the memory of {machine.device}{held}. The state is as it was. Use smaller batches, "
            "accumulate(state, micro_batches, objective), or precision='bf16'."
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
