"""Gradient accumulation: the gradients of several micro-batches as those of the whole batch they are parts of."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from steploop.core.state.parts import Gradients
from steploop.core.state.surroundings import shielded_sums
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward_pass import gradients, require_some, seed_of, take_gradients
from steploop.core.steps.by_parts.part_accumulation import accumulate_parts
from steploop.core.steps.by_parts.part_weights import checked_weight, counts, weighted_sum
from steploop.core.steps.forward import after_passes
from steploop.core.steps.forward_pass import DrewElsewhere, TrainingPasses
from steploop.core.steps.objectives import Objective
from steploop.core.trees import count_samples
from steploop.errors import EmptyDataError, ObjectiveError

__all__ = ["accumulate"]


@shielded_sums
def accumulate(state: TrainState, micro_batches: Iterable[Any], objective: Objective) -> TrainState:
    """Take the place of ``forward_loss`` and ``backward_scaled`` for a batch that comes in parts.

    With L_i the loss of micro-batch i, a mean over w_i samples (or tokens), and S the loss scale:

        loss = Σ w_i L_i / Σ w_i,      grads = Σ w_i ∂(S L_i) / Σ w_i

    so that any partition of a batch, ragged ones and a short last part too, gives the gradient of the whole batch,
    up to the rounding of the sum. BatchNorm is the exception: its statistics are those of each part. So is dropout:
    each part draws its own mask.

    Only one micro-batch's graph is alive at a time.

    Args:
        state: any living state.
        micro_batches: the parts; a list, or an iterable that is read once. Where a state has ranks, each is the ``Parts`` of
            a global micro-batch, and processes communicate once, at the end.
        objective: as for ``forward_loss``. Its third value is the weight w_i, a number >= 0; the default is the number
            of samples, the length of the first axis of all the batch's tensors. A part of weight 0 counts for nothing.

    Returns:
        The state with ``loss`` (shape (), detached), ``outputs`` (a list, one per part) and ``grads``, still multiplied
        by the loss scale.

    Raises:
        EmptyDataError: there is no micro-batch, or the weights sum to 0.
        ObjectiveError: no weight was given and the samples of a batch cannot be counted; a weight is negative or nan.

    Example:
        >>> state = accumulate(state, split(batch, [5, 3]), objective)
        >>> state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
    """
    state.check_alive("accumulate")
    parts = list(micro_batches)
    if state.machine.ranks is not None:
        return accumulate_parts(state, parts, objective)
    if not parts:
        raise EmptyDataError(
            "accumulate: expected at least one micro-batch, but got none. Look at how the batch is split."
        )
    try:
        return _accumulated(state, parts, objective)
    except DrewElsewhere:  # the passes left no trace, and are taken again with all generators seeded
        return _accumulated(state, parts, objective)


def _accumulated(state: TrainState, parts: list[Any], objective: Objective) -> TrainState:
    sizes = [count_samples(part) for part in parts]
    # Known beforehand, the weights go into the backward pass as w_i / Σ w; an objective that gives its own overrides.
    total = float(sum(size or 0 for size in sizes)) or 1.0
    losses, outputs, weights = [], [], []
    grads: list[Tensor | None] = []
    counted = False
    own_weights, unit = False, None
    with TrainingPasses(state) as passes:
        for index, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            loss, out, given = passes.run(part, objective, draw=index)
            own_weights = given is not None if index == 0 else own_weights
            taken = _check_weight(given, size, own_weights=own_weights)
            if own_weights and taken and unit is None:
                unit = _unit(given, len(parts))
            weight = (size or 0) / total if given is None else given / (1.0 if unit is None else unit)
            counted = counted or taken
            if taken:  # the loss of a part without weight may be 0 / 0, whose gradient is nan
                gradients(state, loss, seed_of(state, loss, weight), keep=True, take=False)
            losses.append(loss.detach())
            outputs.append(out)
            weights.append(weight)
        grads = take_gradients(state)
        began = passes.end()
    loss = _weighted_sum(losses, weights)
    if not counted:
        raise EmptyDataError(
            "accumulate: the weights of the micro-batches sum to 0; there is nothing to average over."
        )
    if own_weights:
        whole = sum(weights)
        loss = (loss / whole).to(loss.dtype)
        torch._foreach_div_([g for g in grads if g is not None], whole)
    require_some(grads)
    flight = type(state.flight)(
        loss=loss, outputs=outputs, grads=Gradients(grads), began=began, passes=state.flight.passes + len(parts),
        known=state.flight.known,
    )  # fmt: skip
    return after_passes(state, passes, flight, "accumulate")


def _check_weight(given: Any, size: int | None, *, own_weights: bool) -> bool:
    """Whether a part counts; ObjectiveError where its weight is none."""
    if own_weights != (given is not None):
        raise ObjectiveError(
            "accumulate: the objective gave a weight for some micro-batches and none for others."
        )
    return counts(checked_weight(size if given is None else given, "accumulate"))


def _unit(weight: float | Tensor, parts: int) -> Any:
    """What an objective's own weights are counted in: about Σ w, before it is known.

    A float16 gradient has room for S, not for S times a number of tokens.
    """
    if isinstance(weight, Tensor):  # one that is being traced may be 0 when the graph runs
        return torch.where(weight > 0, weight * parts, torch.ones_like(weight))
    return weight * parts


def _weighted_sum(losses: list[Tensor], weights: list[Any]) -> Tensor:
    loss = torch.stack(losses)
    if all(isinstance(w, float) and w == weights[0] > 0 for w in weights):
        return loss.sum().mul_(weights[0])  # parts of one size, the usual case
    return weighted_sum(loss, weights)
