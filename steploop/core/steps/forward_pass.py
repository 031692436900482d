"""Forward passes of an objective on a state's values, in training mode, whatever the surroundings are."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from steploop.core.ambient_generators import generators_of
from steploop.core.precision import Precision, autocast
from steploop.core.state.copying import lazy_clone, leaf_like
from steploop.core.state.machine import Machine
from steploop.core.state.parts import Began, TensorValues
from steploop.core.state.seeding import SeededGenerators
from steploop.core.state.trace import trace_of
from steploop.core.state.train_state import TrainState
from steploop.core.trees import map_tensors, named_leaves, shapes
from steploop.errors import CompileError, ObjectiveError, OutOfMemoryError, SteploopError

__all__ = [
    "DrewElsewhere",
    "Objective",
    "TrainingPasses",
    "did_not_fit",
    "drop_leftovers",
    "read_objective",
    "seeded_generators",
    "surroundings",
    "translated",
    "unchanged",
]

# objective(model, batch) -> loss | (loss, outputs) | (loss, outputs, weight)
Objective = Callable[[nn.Module, Any], Any]

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't allocate memory")


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

    The state stays as it is: the passes work on copies of its buffers, and of the frozen parameters that the model
    moves itself (a momentum encoder). Several passes of one step go on from each other's buffers and draw apart: the
    generators are seeded from (seed, attempted_steps, number of the pass).
    """

    __slots__ = (
        "_attributes", "_before", "_buffers_before", "_copies", "_drawing", "_frozen_versions", "_generators", "_machine", "_own_params",
        "_state", "_untouched", "_versions", "tensors", "updated_in_place",
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
        self._copies: dict[str, Tensor] = {}
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
        self._own_params = self._params()
        self._before = module.point(state.lease, self._own_params)
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
        self._versions = [leaf._version for leaf in tensors.leaves]
        if machine.not_trained:
            self._frozen_versions = [self._own_params[name]._version for name in machine.not_trained]
        self._generators.__enter__()
        return self

    def _params(self) -> dict[str, Tensor]:
        """The parameters to compute with: copies in the places of those that the model moves itself.

        Which ones it moves is found out in the first pass, on lazy copies of all.
        """
        machine, params = self._machine, self._state.tensors.params
        self._untouched: list[tuple[str, Tensor, int]] = []
        if machine.moved is None:
            if trace_of(self._state) is not None:
                self._untouched = [(name, p, p._version) for name, p in params.items()]
                return params
            self._copies = {name: lazy_clone(p) for name, p in params.items()}
            copied = machine.not_trained
        elif not machine.moved:
            return params
        else:
            if trace_of(self._state) is not None:
                raise _moves(machine.moved[0])
            self._copies = {name: params[name].detach().clone() for name in machine.moved}
            copied = tuple(name for name in machine.moved if name in machine.not_trained)
        if not copied:
            return params
        return {**params, **{name: leaf_like(params[name], lazy_clone(params[name])) for name in copied}}

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
        try:
            with surroundings(machine, state.precision):
                loss, outputs, weight = read_objective(objective(machine.model, batch))
        except (RuntimeError, MemoryError, ValueError) as error:
            if (ours := translated(error, machine, batch)) is None:
                raise
            raise ours from error
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
        state, machine = self._state, self._machine
        module, tensors = machine.module, state.tensors
        if machine.moved is None and trace_of(state) is None:
            module.check()  # a layer that the first pass has made
            machine.moved = self._moved()
        for name, param, version in self._untouched:
            if param._version != version:
                raise _moves(name)
        overwritten = self._overwritten()
        self.updated_in_place = bool(overwritten)
        if overwritten and not {*overwritten} <= {*(machine.moved or ())}:
            machine.moved = tuple(dict.fromkeys([*(machine.moved or ()), *overwritten]))
        moved = (
            {n: self._own_params[n] for n in machine.moved if n in machine.not_trained}
            if machine.moved
            else None
        )
        changes: dict[str, Any] = {}
        if module.buffer_places:
            changes["buffers"] = module.take_buffers()
        if moved:
            changes["params"] = {**tensors.params, **moved}
        if self._attributes is not None:
            module.attributes.learn(self._attributes)
        if module.keeps_extra_state():
            changes["extra"] = module.extra_state()
            if not self._drawing:
                _require_traceable(tensors.extra, changes["extra"])
        self.tensors = tensors.replace(**changes) if changes else tensors
        return state.flight.began or Began(tensors, self._kept(overwritten) if overwritten else {})

    def _kept(self, names: list[str]) -> dict[str, Tensor]:
        """The first values of parameters that were overwritten; of one that moved for the first time there is none."""
        return {name: self._copies[name] for name in names if name in self._copies}

    def _moved(self) -> tuple[str, ...]:
        """The names of the parameters that the first pass has changed."""
        before, now = self._copies, self._own_params
        written = self._written()  # a momentum encoder begins as a copy, and its first move changes no value
        frozen = [n for n in self._machine.not_trained if n in written or not unchanged(now[n], before[n])]
        trained = [
            name
            for name, leaf, version in zip(
                self._machine.trainable, self._state.tensors.leaves, self._versions, strict=True
            )
            if leaf._version != version or not unchanged(leaf, before[name])
        ]
        return (*frozen, *trained)

    def _written(self) -> list[str]:
        """The names of the frozen parameters that the passes wrote to."""
        names = self._machine.not_trained
        if not names:
            return []
        pairs = zip(names, self._frozen_versions, strict=True)
        return [name for name, before in pairs if self._own_params[name]._version != before]

    def _overwritten(self) -> list[str]:
        """The names of the state's own parameters that the passes changed in place, through .data too where that is known.

        Raises:
            CompileError: while a step is traced.
        """
        machine = self._machine
        known = machine.moved or ()
        versions = [leaf._version for leaf in self._state.tensors.leaves]
        if versions == self._versions and not known and not machine.not_trained:
            return []
        late = [name for name in self._written() if name not in known]  # the others were copies
        if versions == self._versions and not known:
            found = late
        else:
            pairs = zip(machine.trainable, versions, self._versions, strict=True)
            found = [*(name for name, now, before in pairs if now != before or name in known), *late]
        if found and not self._drawing:
            raise _moves(found[0])
        return found


def _have_changed(leaves: Sequence[Tensor], grads: list[tuple[Tensor, int]]) -> bool:
    """Whether the leaves have other gradients than ``grads``, which are given with their versions."""
    count = 0
    for leaf in leaves:
        if leaf.grad is not None:
            count += 1
    return count > 0 and (count != len(grads) or any(g._version != version for g, version in grads))


def _require_traceable(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
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


def _moves(name: str) -> CompileError:
    return CompileError(
        f"moves the parameter {name} in its forward pass, which a graph cannot undo where the step is skipped. Run this step in "
        "eager."
    )


def unchanged(now: Tensor, before: Tensor) -> bool:
    """Whether a copy has its first value; one whose memory is still shared lazily was never written to."""
    if hasattr(torch._C, "_is_cow_tensor") and torch._C._is_cow_tensor(now):
        return True
    with torch.no_grad():
        return now.shape == before.shape and torch.equal(now.detach(), before)


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
