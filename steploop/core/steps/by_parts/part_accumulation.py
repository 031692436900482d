"""Gradient accumulation over micro-batches that come in parts: ranks tell each other about them once, at the end."""

from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.ranks import Ranks
from steploop.core.state.parts import Gradients
from steploop.core.state.sharded import local_part
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward_pass import gradients, require_some, seed_of, take_gradients
from steploop.core.steps.by_parts.part_agreement import Ran, agree, mean_buffers
from steploop.core.steps.by_parts.part_passes import ended, is_empty, parts_of, run_part
from steploop.core.steps.by_parts.part_sums import PartSum
from steploop.core.steps.by_parts.part_weights import counts
from steploop.core.steps.by_parts.sharded_steps import require_weights, stand_in
from steploop.core.steps.forward_pass import DrewElsewhere, TrainingPasses
from steploop.core.steps.objectives import Objective
from steploop.core.trees import count_samples
from steploop.errors import ObjectiveError

__all__ = ["accumulate_parts"]


def accumulate_parts(state: TrainState, micro_batches: Sequence[Any], objective: Objective) -> TrainState:
    """Take ``accumulate``'s step for micro-batches each of which is the parts of a global one.

    A part's buffers go from micro-batch to micro-batch, and their mean over parts is taken at the end.
    """
    ranks = cast("Ranks", state.machine.ranks)
    micros = [parts_of(state, batch, "accumulate") for batch in micro_batches]
    units = _Units(ranks, micros, state.device)
    sharded = state.machine.module.sharded is not None
    filler = stand_in(state, micros, is_empty, "accumulate") if sharded else None
    try:
        run = _Run(state, micros, objective, units, filler)
    except DrewElsewhere:  # the passes left no trace, and are taken again with all generators seeded
        run = _Run(state, micros, objective, units, filler)
    agreed = agree(state, run.ran, "accumulate")
    grads = take_gradients(state) if sharded else run.total.result()
    if sharded:
        require_weights(agreed.shares, agreed.ran, "accumulate")
    if agreed.own_weights:
        values = [local_part(g) for g in grads if g is not None]
        torch._foreach_div_(values, agreed.whole / units.whole)
    require_some(grads)
    flight = type(state.flight)(
        loss=agreed.loss, outputs=run.outputs(), grads=Gradients(grads), began=run.began,
        passes=state.flight.passes + units.count * ranks.parts, known=state.flight.known,
    )  # fmt: skip
    tensors = state.tensors.replace(buffers=mean_buffers(state, agreed, run.ran))
    return state.replace(tensors=tensors, flight=flight)


class _Units:
    """What weights are counted in, about Σ w, agreed on after the first pass: the gradient of S w L / Σ w has to fit.

    Attributes:
        count: of the micro-batches, on the rank that has most.
        whole: Σ w where the weights are numbers of samples; else the weight of the first pass, times the number of passes.
    """

    def __init__(self, ranks: Ranks, micros: Sequence[Parts], device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._micros = micros
        self.count = 0
        self.whole: Any = None

    def agree(self, first: Ran | None = None) -> None:
        """Agree, once; ``first`` is this rank's first pass, if there is one."""
        if self.whole is not None:
            return
        ranks, micros = self._ranks, self._micros
        sizes = [count_samples(b) or 0 for parts in micros for b in parts.batches if not is_empty(b)]
        # the same unit on any number of ranks: that of the first part of the first micro-batch
        leads = first is not None and ranks.rank == 0 and not is_empty(micros[0].batches[0])
        weight: Any = first.weight if first is not None and first.own and leads else 0.0
        own = first is not None and first.own
        mine = [float(len(micros)), float(sum(sizes)), float(own), weight]
        told = [mine]
        if ranks.size > 1:
            row = torch.tensor(mine, dtype=torch.float64, device=self._device)
            told = ranks.gather_tensors(row).tolist()
        self.count = int(max(count for count, *_ in told))
        if any(own for _, _, own, _ in told):
            weight = told[0][3]
            passes = self.count * ranks.parts
            if isinstance(weight, Tensor):  # it is being traced, and may be 0 when the graph runs
                self.whole = torch.where(weight > 0, weight, torch.ones_like(weight)) * passes
            else:
                self.whole = (weight or 1.0) * passes
        else:
            self.whole = sum(size for _, size, *_ in told) or 1.0


class _Run:
    """The passes of this process's parts, each part's micro-batches after one another; one graph is alive at a time."""

    def __init__(
        self, state: TrainState, micros: Sequence[Parts], objective: Objective, units: _Units, filler: Any
    ) -> None:
        ranks = cast("Ranks", state.machine.ranks)
        self._state = state
        self._micros = micros
        self._units = units
        self._filler = filler
        self._sharded = state.machine.module.sharded is not None
        self._outputs: list[list[Any]] = [[] for _ in micros]
        self.total = PartSum(ranks, state.tensors.leaves, state.machine.buckets)
        with TrainingPasses(state) as passes:
            self.ran = [
                self._part(passes, objective, place, number) for place, number in enumerate(ranks.mine)
            ]
            self.began = ended(state, passes, tuple(self.ran))
        units.agree()

    def _part(self, passes: TrainingPasses, objective: Objective, place: int, number: int) -> Ran:
        state, parts = self._state, cast("Ranks", self._state.machine.ranks).parts
        buffers, ran = state.tensors.buffers, []
        for index, micro in enumerate(self._micros):
            batch = micro.batches[place]
            draw = index * parts + number
            if is_empty(batch):
                self._outputs[index].append(None)
                if self._sharded:
                    self._take_part(passes, objective, draw)
                continue
            one = run_part(passes, buffers, batch, objective, draw=draw, by="accumulate")
            self._units.agree(one)
            buffers = dict(one.buffers)
            if (
                counts(one.weight) or self._sharded
            ):  # the loss of a part without weight may be 0 / 0, whose gradient is nan
                loss = cast("Tensor", one.loss)
                seed = seed_of(state, loss, one.weight / self._units.whole)
                gradients(state, loss, seed, keep=True, take=False)
            self._outputs[index].append(one.outputs)
            ran.append(attrs.evolve(one, loss=None if one.loss is None else one.loss.detach()))
        if not self._sharded:  # whose backward passes sum over the ranks
            self.total.add(number, take_gradients(state))
        return _together(ran)

    def _take_part(self, passes: TrainingPasses, objective: Objective, draw: int) -> None:
        """Of a sharded model: a pass of another batch, which counts for nothing, where this rank has no samples."""
        state = self._state
        one = run_part(passes, state.tensors.buffers, self._filler, objective, draw=draw, by="accumulate")
        self._units.agree()
        loss = cast("Tensor", one.loss)
        gradients(state, loss, seed_of(state, loss, 0.0), keep=True, take=False)

    def outputs(self) -> list[Parts | None]:
        """Of the objective, for each micro-batch."""
        return [
            None if all(o is None for o in given) else attrs.evolve(micro, batches=given)
            for micro, given in zip(self._micros, self._outputs, strict=True)
        ]


def _together(ran: Sequence[Ran]) -> Ran:
    """The micro-batches of one part as one pass."""
    if not ran:
        return Ran()
    if len({r.own for r in ran}) > 1:
        raise ObjectiveError(
            "accumulate: the objective gave a weight for some micro-batches and none for others."
        )
    weight = sum(r.weight for r in ran)
    loss = cast("Tensor", ran[0].loss)
    if len(ran) > 1:
        shares = [r.weight / weight if counts(weight) else 0.0 for r in ran]
        terms = [cast("Tensor", r.loss).double() * s for r, s in zip(ran, shares, strict=True) if counts(s)]
        loss = torch.stack(terms).sum().to(loss.dtype) if terms else loss
    changed = frozenset().union(*(r.changed for r in ran))
    return Ran(loss, None, weight, ran[0].own, ran[-1].buffers, changed)
