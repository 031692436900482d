"""What ranks tell each other about the parts of a batch: losses and weights, and the mean of their buffers."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.part_sums import PartSum
from steploop.core.steps.by_parts.part_weights import counts, weighted_sum
from steploop.errors import ConfigError, EmptyDataError, ObjectiveError

__all__ = ["Agreed", "Ran", "agree", "mean_buffers"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@attrs.define(eq=False)
class Ran:
    """What the pass of one part gave.

    Attributes:
        loss: of the part, with its graph; None where the part has no samples and was not run.
        outputs: of the objective.
        weight: of the loss; a tensor while it is traced.
        own: whether the objective gave the weight.
        buffers: after the pass.
        changed: the names of the buffers that it changed.
        stand_in: of a sharded model: the loss of a batch that was computed in the place of no samples.
    """

    loss: Tensor | None = None
    outputs: Any = None
    weight: Any = 0.0
    own: bool = False
    buffers: Mapping[str, Tensor] = attrs.field(factory=dict)
    changed: frozenset[str] = frozenset()
    stand_in: Tensor | None = None


@attrs.frozen(eq=False)
class Agreed:
    """What all processes know of the parts.

    Attributes:
        loss: the mean over all parts.
        whole: the weight of all parts.
        shares: the weight of every part over that of all.
        own_weights: whether the objective gave the weights.
        ran: whether each part was run: the others had no samples.
        first: the number of the first part that was run.
        changed: the names of the buffers that some part changed.
    """

    loss: Tensor
    whole: Any
    shares: list[Any]
    own_weights: bool
    ran: list[bool]
    first: int
    changed: tuple[str, ...]


def agree(state: TrainState, ran: Sequence[Ran], by: str) -> Agreed:
    """Tell each other the loss and the weight of every part, and which buffers it changed."""
    names = state.machine.module.buffer_names()
    ranks = cast("Ranks", state.machine.ranks)
    told = _own_table(state, ran) if ranks.size == 1 else _gathered(state, ran, names)
    own = {own for own in told.own if own is not None}
    if len(own) == 2:
        raise ObjectiveError(f"{by}: the objective gave a weight for some parts and none for others.")
    whole = sum(told.weights)
    if type(whole) in {int, float} and not whole:
        raise EmptyDataError(f"{by}: the weights of all parts sum to 0; there is nothing to average over.")
    shares = [weight / whole for weight in told.weights]
    first = next(number for number, own in enumerate(told.own) if own is not None)
    changed = tuple(n for n in names if n in told.changed)
    there = [own is not None for own in told.own]
    return Agreed(
        weighted_sum(told.losses, shares).to(told.dtype), whole, shares, True in own, there, first, changed
    )


@attrs.frozen(eq=False)
class _Table:
    """Loss, weight and whose weight it is (None: not run) of every part; the dtype of a loss; buffers that changed."""

    losses: Tensor
    weights: list[Any]
    own: list[bool | None]
    dtype: torch.dtype
    changed: frozenset[str]


def _own_table(state: TrainState, ran: Sequence[Ran]) -> _Table:
    """Of one process, which has all parts."""
    zero = torch.zeros((), dtype=torch.float64, device=state.device)
    losses = torch.stack([zero if r.loss is None else r.loss.detach().double() for r in ran])
    dtype = next((r.loss.dtype for r in ran if r.loss is not None), torch.float32)
    own = [None if r.loss is None else r.own for r in ran]
    return _Table(losses, [r.weight for r in ran], own, dtype, frozenset().union(*(r.changed for r in ran)))


def _gathered(state: TrainState, ran: Sequence[Ran], names: Sequence[str]) -> _Table:
    """Of all processes: a row of numbers for each part, whose loss stays on its device until it is gathered."""
    rows = torch.zeros(len(ran), 4 + len(names), dtype=torch.float64)
    for row, r in zip(rows, ran, strict=True):
        if r.loss is not None:
            row[1:4] = torch.tensor([r.weight, 2.0 if r.own else 1.0, _DTYPES.index(r.loss.dtype)])
            row[4:] = torch.tensor([name in r.changed for name in names])
    rows = rows.to(state.device)
    for row, r in zip(rows, ran, strict=True):
        if r.loss is not None:
            row[0] = r.loss.detach()
    ranks = cast("Ranks", state.machine.ranks)
    rows = ranks.gather_tensors(rows).flatten(0, 1)
    told = rows[:, 1:].tolist()
    own = [None if row[1] == 0 else row[1] == 2 for row in told]
    dtype = next((_DTYPES[int(row[2])] for row in told if row[1]), torch.float32)
    changed = frozenset(name for i, name in enumerate(names) if any(row[3 + i] for row in told))
    return _Table(rows[:, 0], [row[0] for row in told], own, dtype, changed)


def mean_buffers(state: TrainState, agreed: Agreed, ran: Sequence[Ran]) -> dict[str, Tensor]:
    """The buffers after the passes: the weighted mean over parts; of integers those of the first part that was run."""
    before, ranks = state.tensors.buffers, cast("Ranks", state.machine.ranks)
    for r in ran:
        for name in agreed.changed if r.loss is not None else ():
            _check_shape(name, r.buffers.get(name), before.get(name))
    if not agreed.changed:
        return before
    total = PartSum(ranks, [before[name] for name in agreed.changed], state.machine.buckets, agreed.changed)
    with torch.no_grad():
        for number, r in zip(ranks.mine, ran, strict=True):
            share, first = agreed.shares[number], number == agreed.first
            total.add(number, [_counted(r.buffers.get(n), share, first=first) for n in agreed.changed])
        means = zip(agreed.changed, total.result(), strict=True)
    return {**before, **{name: mean for name, mean in means if mean is not None}}


def _check_shape(name: str, now: Tensor | None, before: Tensor | None) -> None:
    if now is None or before is None or (now.shape, now.dtype) != (before.shape, before.dtype):
        raise ConfigError(
            f"forward_loss: the model makes, drops or reshapes the buffer {name} in its forward pass, which the parts of a batch "
            "would each do their own way. Register it with the shape that it keeps, or train without ranks."
        )


def _counted(buffer: Tensor | None, share: Any, *, first: bool) -> Tensor | None:
    if buffer is None:
        return None
    if buffer.is_floating_point() or buffer.is_complex():
        return (buffer.detach() * share).to(buffer.dtype) if counts(share) else None
    return buffer.detach().clone() if first else None
