"""Forward passes of an objective on a state's values, in training mode, whatever the surroundings are."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from steploop.core.ambient_generators import generators_of
from steploop.core.precision import Precision, autocast
from steploop.core.state.copying import lazy_clone
from steploop.core.state.machine import Machine
from steploop.core.state.parts import Began, TensorValues
from steploop.core.state.seeding import SeededGenerators
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.steps.moved_params import MovedParams
from steploop.core.steps.objectives import Objective, read_objective
from steploop.core.steps.other_modules import buffers_beside, refuse_changed
from steploop.core.steps.pass_failures import translated
from steploop.core.trees import map_tensors, named_leaves
from steploop.errors import CompileError, ObjectiveError

__all__ = [
    "DrewElsewhere",
    "TrainingPasses",
    "drop_leftovers",
    "require_traceable",
    "seeded_generators",
    "surroundings",
]


def seeded_generators(machine: Machine, *coordinates: int, others: bool = True) -> SeededGenerators:
    """Seed the generators that a computation of ``machine`` may draw from, for the length of a ``with`` block."""
    if machine.generators is None:
        machine.generators = generators_of(machine.device)
    return SeededGenerators(machine.generators, coordinates, others)


class DrewElsewhere(Exception):  # noqa: N818  (it says what happened: the passes are taken again)
    """A pass drew from Python's or NumPy's generator for the first time, when they were not seeded."""


def drop_leftovers(leaves: Sequence[Tensor]) -> None:
    """Let no parameter have a ``.grad``: somebody's leftover would be added to ours."""
    for leaf in leaves:
        if leaf.grad is not None:
            leaf.grad = None


def surroundings(machine: Machine, precision: Precision, *, grad: bool = True) -> AbstractContextManager[Any]:
    """The grad mode and the autocast that a forward pass runs under; its caller is shielded from all else."""
    if torch.is_grad_enabled() is grad:
        return autocast(precision, machine.device_type)
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(grad))
    stack.enter_context(autocast(precision, machine.device_type))
    return stack


class TrainingPasses:
    """Forward passes in training mode on a state's values; the module and the generators are put back on leaving.

    The state stays as it is: the passes work on copies of its buffers, and of the frozen parameters that the model
    moves itself (a momentum encoder). Several passes of one step go on from each other's buffers and draw apart: the
    generators are seeded from (seed, attempted_steps, number of the pass).
    """

    __slots__ = (
        "_attributes", "_before", "_buffers_before", "_drawing", "_generators", "_machine", "_moved", "_state", "tensors",
        "updated_in_place",
    )  # fmt: skip

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._machine = machine = state.machine
        # while a step is traced nothing is drawn: the trace notes where generators are seeded
        trace = trace_of(state)
        self._drawing = trace is None
        self._generators = (
            seeded_generators(machine, others=machine.draws_elsewhere is not False)
            if trace is None
            else trace.generators(state)
        )
        self._before: Mapping[str, Tensor] | None = None
        self._attributes: Any = None
        self.tensors: TensorValues = state.tensors
        self.updated_in_place = False

    def __enter__(self) -> Self:
        state, machine = self._state, self._machine
        module, tensors = machine.module, state.tensors
        if machine.not_trained:
            machine.check_frozen(tensors.params)
        drop_leftovers(tensors.leaves)
        self._moved = MovedParams(state, traced=not self._drawing)
        self._before = module.point(state.lease, self._moved.params)
        if self._before is not None:
            self._buffers_before = module.buffers()
        if module.buffer_places:
            module.check_buffers()
        if tensors.buffers:
            # BatchNorm updates its statistics in place: the old state keeps its own
            module.place_buffers({name: b.clone() for name, b in tensors.buffers.items()})
        elif module.buffer_places:
            module.place_buffers({})
        if module.keeps_extra_state():
            module.set_extra_state(tensors.extra)
        if self._drawing:
            self._attributes = module.attributes.look()
        module.set_training(training=True)
        self._generators.__enter__()
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._generators.__exit__()
        module = self._machine.module
        if self._before is not None:
            module.place_params(self._before)
            module.place_buffers(self._buffers_before)
        elif module.placed is not self.tensors.params:
            module.place_params(self.tensors.params)
        if failure is not None:
            module.forget_buffers()
            if self._attributes is not None:
                module.attributes.put_back(self._attributes)
            # the parts before have left gradients, which may be what there is no room for
            for leaf in self._state.tensors.leaves:
                leaf.grad = None

    def run(
        self, batch: Any, objective: Objective, draw: int = 0, *, keep_graph: bool = False
    ) -> tuple[Tensor, Any, Any]:
        """The loss with its graph, the outputs (detached unless ``keep_graph``), and the objective's weight or None."""
        state, machine = self._state, self._machine
        self._generators.seed(state.seed, state.attempted_steps, state.flight.passes + draw)
        leaves = state.tensors.leaves
        grads = [(leaf.grad, leaf.grad._version) for leaf in leaves if leaf.grad is not None] if draw else []
        beside = None if self._attributes is None else buffers_beside(objective, machine.model)
        try:
            with surroundings(machine, state.precision):
                loss, outputs, weight = read_objective(objective(machine.model, batch))
        except (RuntimeError, MemoryError, ValueError) as error:
            if (ours := translated(error, machine, batch)) is None:
                raise
            raise ours from error
        if beside:
            refuse_changed(beside)
        if self._drawing:
            self._look_at_draws()
        if _have_changed(leaves, grads):
            raise ObjectiveError(
                "The objective called backward() itself. An objective returns the loss; backward_scaled computes the "
                "gradients. For gradients inside of an objective, use torch.autograd.grad(..., create_graph=True)."
            )
        if not loss.requires_grad:
            raise ObjectiveError(
                "The loss depends on no parameter that requires a gradient: it was detached, computed under "
                "torch.no_grad(), or does not use the model that the objective was given."
            )
        return loss, outputs if keep_graph else map_tensors(Tensor.detach, outputs), weight

    def begin_again(self, buffers: Mapping[str, Tensor]) -> None:
        """Let the next pass begin from copies of these buffers, and from the state's extra state."""
        module = self._machine.module
        module.place_buffers({name: lazy_clone(b) for name, b in buffers.items()})
        module.set_extra_state(self._state.tensors.extra)

    def buffers(self) -> dict[str, Tensor]:
        """The buffers after the last pass."""
        return self._machine.module.buffers()

    def _look_at_draws(self) -> None:
        """Seeding Python's and NumPy's generators costs 6 us: it is done from the first pass on that draws from them."""
        machine, generators = self._machine, self._generators
        if generators.watched:
            if generators.moved():
                machine.draws_elsewhere = True
                raise DrewElsewhere
        elif not machine.draws_elsewhere:
            machine.draws_elsewhere = generators.moved()

    def end(self) -> Began:
        """Take over what the passes changed, as ``tensors``; what the step began with.

        ``updated_in_place`` says afterwards whether the model changed trained parameters: then the state that went
        in is spent.
        """
        state, module, tensors = self._state, self._machine.module, self._state.tensors
        overwritten = self._moved.look()
        self.updated_in_place = bool(overwritten)
        changes: dict[str, Any] = {}
        if module.buffer_places:
            changes["buffers"] = module.take_buffers()
        if frozen := self._moved.frozen():
            changes["params"] = {**tensors.params, **frozen}
        if self._attributes is not None:
            module.attributes.learn(self._attributes)
        if module.keeps_extra_state():
            changes["extra"] = module.extra_state()
            if not self._drawing:
                require_traceable(tensors.extra, changes["extra"])
        self.tensors = tensors.replace(**changes) if changes else tensors
        return state.flight.began or Began(
            tensors, self._moved.first_values(overwritten) if overwritten else {}
        )


def _have_changed(leaves: Sequence[Tensor], grads: list[tuple[Tensor, int]]) -> bool:
    """Whether the leaves have other gradients than ``grads``, which are given with their versions."""
    count = 0
    for leaf in leaves:
        if leaf.grad is not None:
            count += 1
    return count > 0 and (count != len(grads) or any(g._version != version for g, version in grads))


def require_traceable(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CompileError for an attribute that a traced pass has changed, unless in tensors of the same shapes."""
    for key in before.keys() | now.keys():
        if key not in before or key not in now or _plain_part(before[key]) != _plain_part(now[key]):
            raise CompileError(
                f"changes model.{key} in Python, which a graph would do once. Keep it in tensors of one shape (a buffer of the "
                "module, state.carry), or change it outside of train_step."
            )


def _plain_part(tree: Any) -> list[tuple[str, Any]]:
    """What a graph cannot change of a tree: its names, the shapes of its tensors, and its other values."""
    return [(n, x.shape if isinstance(x, Tensor) else (type(x), x)) for n, x in named_leaves(tree)]
