"""One pass for each part of a batch, and their gradients summed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, cast

import attrs
from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.ranks import Ranks
from steploop.core.state.copying import unchanged
from steploop.core.state.parts import Began
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward_pass import gradients, recomputed, seed_of, take_gradients
from steploop.core.steps.by_parts.part_agreement import Agreed, Ran
from steploop.core.steps.by_parts.part_sums import PartSum
from steploop.core.steps.by_parts.part_weights import checked_weight, counts
from steploop.core.steps.by_parts.sharded_steps import stand_in
from steploop.core.steps.forward_pass import TrainingPasses
from steploop.core.steps.objectives import Objective
from steploop.core.trees import count_samples, first_difference
from steploop.errors import ConfigError

__all__ = [
    "PartGraphs",
    "RanParts",
    "computed_by",
    "ended",
    "is_empty",
    "joined_parts",
    "part_gradients",
    "parts_of",
    "run_part",
    "run_parts",
]


class _Compiler(Protocol):
    def __call__(self, objective: Objective, *, keep_graph: bool) -> Objective:
        """What computes the pass of a part in the place of ``objective``."""
        ...


_compiler: ContextVar[_Compiler | None] = ContextVar("_compiler", default=None)


@contextmanager
def computed_by(compiler: _Compiler) -> Iterator[None]:
    """Let ``compiler`` compute the passes of parts, for the length of a ``with`` block."""
    token = _compiler.set(compiler)
    try:
        yield
    finally:
        _compiler.reset(token)


@attrs.frozen(eq=False)
class PartGraphs:
    """The losses of this process's parts with their graphs; stands in the place of one loss until it is differentiated.

    Attributes:
        numbers: of the parts.
        losses: None for a part that counts for nothing.
        shares: the weight of each part over the weight of all parts of all processes.
    """

    numbers: range
    losses: tuple[Tensor | None, ...]
    shares: tuple[Any, ...]


@attrs.frozen(eq=False)
class RanParts:
    """What the passes of this process's parts gave, and what the step began with."""

    parts: Parts
    ran: tuple[Ran, ...]
    began: Began

    def outputs(self) -> Parts | None:
        """Of the objective, for each part."""
        if all(r.outputs is None for r in self.ran):
            return None
        return attrs.evolve(self.parts, batches=[r.outputs for r in self.ran])

    def graphs(self, agreed: Agreed) -> PartGraphs:
        """What ``backward_scaled`` differentiates."""
        losses = tuple(r.loss if counts(r.weight) else r.stand_in for r in self.ran)
        numbers = self.parts.numbers
        return PartGraphs(numbers, losses, tuple(agreed.shares[number] for number in numbers))


def parts_of(state: TrainState, batch: Any, by: str) -> Parts:
    """The parts that a batch is made of, checked; a tree of the parts of fields becomes the parts of trees."""
    ranks = state.machine.ranks
    if ranks is None:
        raise ConfigError(
            f"{by}: the batch is Parts, but this state was made without ranks. Make it with TrainState.create(..., "
            "ranks=Ranks.here())."
        )
    parts = joined_parts(batch)
    if parts is None:
        raise ConfigError(
            f"{by}: this state was made with ranks, and takes the parts of a global batch. Give it split_parts(batch, "
            "state.ranks), where batch is the same on every rank."
        )
    if (parts.numbers, parts.total) != (ranks.mine, ranks.parts) or len(parts.batches) != len(parts.numbers):
        raise ConfigError(
            f"{by}: expected the parts {ranks.mine} of {ranks.parts} on rank {ranks.rank} of {ranks.size}, but got "
            f"{len(parts.batches)} parts, {parts.numbers} of {parts.total}."
        )
    return parts


def joined_parts(tree: Any) -> Parts | None:
    """The parts of a tree whose fields are parts: (x, y) -> parts of (x, y). None if there are none."""
    if type(tree) is Parts:
        return tree
    fields = {}
    if isinstance(tree, Mapping):
        fields = {key: joined_parts(value) for key, value in tree.items()}
    elif type(tree) in {tuple, list}:
        fields = dict(enumerate(map(joined_parts, tree)))
    first = next((part for part in fields.values() if part is not None), None)
    if first is None:
        return None
    batches: list[Any] = []
    for index in range(len(first.batches)):
        items = {key: tree[key] if part is None else part.batches[index] for key, part in fields.items()}
        missing = any(part is not None and part.batches[index] is None for part in fields.values())
        whole = items if isinstance(tree, Mapping) else type(tree)(items.values())
        batches.append(None if missing else whole)
    return Parts(batches, first.numbers, first.total)


def run_parts(state: TrainState, parts: Parts, objective: Objective, *, keep_graph: bool) -> RanParts:
    """Run the pass of each part, all from the buffers that the state has; a part without samples is left out."""
    filler = (
        None if state.machine.module.sharded is None else stand_in(state, [parts], is_empty, "forward_loss")
    )
    with TrainingPasses(state) as passes:
        ran = tuple(
            _left_out(passes, state, filler, objective, number)
            if is_empty(batch)
            else run_part(
                passes,
                state.tensors.buffers,
                batch,
                objective,
                draw=number,
                by="forward_loss",
                keep_graph=keep_graph,
            )
            for number, batch in zip(parts.numbers, parts.batches, strict=True)
        )
        return RanParts(parts, ran, ended(state, passes, ran))


def _left_out(
    passes: TrainingPasses, state: TrainState, filler: Any, objective: Objective, number: int
) -> Ran:
    """A part without samples; of a sharded model its rank computes another batch, which counts for nothing."""
    if state.machine.module.sharded is None:
        return Ran()
    done = run_part(passes, state.tensors.buffers, filler, objective, draw=number, by="forward_loss")
    return Ran(stand_in=done.loss)


def is_empty(batch: Any) -> bool:
    """Whether a part has no samples: it is not computed."""
    return batch is None or (isinstance(batch, (list, tuple)) and not batch) or count_samples(batch) == 0


def run_part(
    passes: TrainingPasses,
    buffers: Mapping[str, Tensor],
    batch: Any,
    objective: Objective,
    *,
    draw: int,
    by: str,
    keep_graph: bool = False,
) -> Ran:
    """The pass of one part, from copies of ``buffers``."""
    passes.begin_again(buffers)
    if (compiler := _compiler.get()) is not None:
        objective = compiler(objective, keep_graph=keep_graph)
    loss, outputs, weight = passes.run(batch, objective, draw=draw, keep_graph=keep_graph)
    found = passes.buffers()
    changed = {n for n, b in found.items() if n not in buffers or not unchanged(b, buffers[n])}
    changed |= buffers.keys() - found.keys()
    own = weight is not None
    weight = checked_weight(weight if own else count_samples(batch), by)
    return Ran(loss, outputs, weight, own, found, frozenset(changed))


def ended(state: TrainState, passes: TrainingPasses, ran: tuple[Ran, ...]) -> Began:
    """End the passes; ConfigError where they changed what parts cannot: parameters, a module's extra state."""
    if all(r.loss is None for r in ran):
        return state.flight.began or Began(state.tensors)
    began = passes.end()
    moved = state.machine.moved
    what = f"the parameter {moved[0]}" if moved else None
    before, after = state.tensors.extra, passes.tensors.extra
    if after is not before and (difference := first_difference(before, after)) is not None:
        what = f"the extra state of a module (get_extra_state, or a plain attribute: {difference})"
    if what is not None:
        raise ConfigError(
            f"forward_loss: the model changes {what} in its forward pass, which the parts of a batch would each do their own "
            "way. Keep it in a buffer (register_buffer), or train without ranks."
        )
    return began


def part_gradients(state: TrainState, graphs: PartGraphs, *, keep_graph: bool) -> list[Tensor | None]:
    """The gradients of the mean loss: a backward pass for each part, and their sum over all processes."""
    if state.machine.module.sharded is not None:
        return _summed_by_backward(state, graphs, keep_graph=keep_graph)
    total = PartSum(cast("Ranks", state.machine.ranks), state.tensors.leaves, state.machine.buckets)
    for number, loss, share in zip(graphs.numbers, graphs.losses, graphs.shares, strict=True):
        grads: list[Tensor | None] = [None] * len(state.tensors.leaves)
        if loss is not None:
            seed = seed_of(state, loss, share)
            # what a recomputed forward pass writes into buffers is dropped: the mean has what the first one wrote
            with total.sending(number, state.tensors.leaves):
                _, grads = recomputed(state, partial(gradients, state, loss, seed, keep_graph=keep_graph))
        total.add(number, grads)
    return total.result()


def _summed_by_backward(state: TrainState, graphs: PartGraphs, *, keep_graph: bool) -> list[Tensor | None]:
    """Of a sharded model: every backward pass sums over all ranks, and leaves each the part that it holds."""
    for number, (loss, share) in enumerate(zip(graphs.losses, graphs.shares, strict=True)):
        whole = cast("Tensor", loss)  # a part that does not count has a stand-in
        seed = seed_of(state, whole, share)
        run = partial(gradients, state, whole, seed, keep=number > 0, take=False, keep_graph=keep_graph)
        recomputed(state, run)
    return take_gradients(state)
