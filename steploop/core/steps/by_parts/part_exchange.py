"""Sum tensors over ranks: in buckets of flat memory, by the tree of the parts."""

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.steps.by_parts.part_tree import Node, join, nodes_of

__all__ = ["Bucket", "Exchange", "bucketed"]

_Values = Sequence[Tensor | None]

BUCKET_BYTES = 32 << 20
SMALL_BYTES = 1 << 20  # of what a rank gets: below, one message costs less than two
QUICK_BYTES = 256 << 10  # up to here gloo is quicker to give everything to everybody than to all-reduce
_ALIGNED_BYTES = 64  # as torch allocates: kernels may sum in another order where memory begins elsewhere
_SUMMED_AS_HERE = {torch.float32, torch.float64}  # a backend may round the sum of two halves its own way


@attrs.frozen(eq=False)
class Bucket:
    """Some tensors behind one another in flat memory, and after them for each in how many parts it is not None.

    Attributes:
        places: which tensors.
        starts: where each begins, in elements.
        marks: where the counts begin.
        strides: of each.
        length: in elements; a multiple of the number of ranks.
        dtype: of its tensors.
        kept: memory that is used again at every step: to allocate it costs more than to send it.
    """

    places: tuple[int, ...]
    starts: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    marks: int
    length: int
    dtype: torch.dtype
    kept: dict[str, Tensor] = attrs.field(factory=dict)

    def memory(self, name: str, length: int, like: Tensor) -> Tensor:
        """Flat memory that is kept from step to step."""
        if name not in self.kept:
            self.kept[name] = torch.empty(length, dtype=self.dtype, device=like.device)
        return self.kept[name]

    @property
    def nbytes(self) -> int:
        """Of its flat memory."""
        return self.length * self.dtype.itemsize

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in flat memory, laid out as autograd lays out the gradient of each."""
        return [
            flat.as_strided(t.shape, strides, start)
            for t, strides, start in zip(like, self.strides, self.starts, strict=True)
        ]

    def fill(self, flat: Tensor, views: list[Tensor], values: _Values) -> None:
        """Write values into flat memory; None as zeros."""
        marks = flat[self.marks :]
        if all(value is not None for value in values):
            torch._foreach_copy_(views, values)  # type: ignore[arg-type]  # there is no None
            marks.fill_(1)
            return
        marks.zero_()
        for view, value, mark in zip(views, values, marks, strict=False):
            if value is None:
                view.zero_()
            else:
                view.copy_(value)
                mark.fill_(1)


def _dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, each element once, in any order of its axes."""
    expected = 1
    for stride, size in sorted(
        (st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of the gradient that autograd makes for a parameter."""
    own: tuple[int, ...] = tensor.stride()
    return own if _dense(tensor) else torch.empty(tensor.shape, device="meta").stride()


def _rounded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def bucketed(like: Sequence[Tensor], ranks: int) -> list[Bucket]:
    """Put tensors into buckets of about ``BUCKET_BYTES``: the last ones, whose gradients are there first, first."""
    groups: list[list[int]] = []
    opened: dict[torch.dtype, tuple[list[int], int]] = {}
    for place in reversed(range(len(like))):
        t = like[place]
        members, size = opened.get(t.dtype, (None, 0))
        if members is None or size + t.nbytes > BUCKET_BYTES:
            groups.append(members := [])
            size = 0
        members.append(place)
        opened[t.dtype] = (members, size + t.nbytes)
    buckets = []
    for members in groups:
        dtype = like[members[0]].dtype
        aligned = _ALIGNED_BYTES // dtype.itemsize
        strides = [_strides(like[place]) for place in members]
        starts, end = [], 0
        for place in members:
            starts.append(end)
            end += _rounded(like[place].numel(), aligned)
        length = _rounded(end + len(members), ranks * aligned)
        buckets.append(Bucket(tuple(members), tuple(starts), tuple(strides), end, length, dtype))
    return buckets


class Exchange:
    """The sum of one bucket over ranks, under way.

    Of two ranks there is one order to sum in, and an all-reduce takes it where a bucket is large. A small bucket goes to everybody as it is. Of any
    other each rank gets a piece from all, sums it in the order of the tree, and gives the sum to all: the traffic of an
    all-reduce. Ranks that need no fixed order leave it to an all-reduce.

    Args:
        ranks: over which to sum.
        bucket: what is summed.
        like: a tensor of the shape and layout of each.
        nodes: the values of this rank's nodes of the tree.
    """

    def __init__(
        self, ranks: Ranks, bucket: Bucket, like: Sequence[Tensor], nodes: Sequence[tuple[Node, _Values]]
    ) -> None:
        from torch import distributed

        self._ranks = ranks
        self._bucket = bucket
        rows = [bucket.memory(f"row {i}", bucket.length, like[0]) for i in range(len(nodes))]
        self._flat = rows[0]
        self._views = bucket.views(self._flat, like)
        for flat, (_, values) in zip(rows, nodes, strict=True):
            bucket.fill(flat, self._views if flat is self._flat else bucket.views(flat, like), values)
        # where the sums go: new memory for each step would cost more than the copy
        self._own = [
            next((v for _, values in nodes if (v := values[place]) is not None), None)
            for place in range(len(like))
        ]
        self._got: Tensor | None = None
        self._in_pieces = False
        self._works: list[Any]
        owned = [nodes_of(attrs.evolve(ranks, rank=r).mine, ranks.parts) for r in range(ranks.size)]
        most = max(map(len, owned))
        pair = ranks.size == 2 and most == 1 and bucket.dtype in _SUMMED_AS_HERE
        room = min(QUICK_BYTES, SMALL_BYTES // ranks.size)
        quick = most == 1 and like[0].is_cpu and bucket.nbytes <= room
        if not quick and (pair or not ranks.exact):
            for row in rows[1:]:
                self._flat += row
            self._works = [distributed.all_reduce(self._flat, group=ranks.group, async_op=True)]
            return
        self._owned = owned
        rows += [self._flat] * (most - len(rows))  # a rank whose parts are fewer nodes sends some for nothing
        self._in_pieces = most == 1 and bucket.nbytes * ranks.size > SMALL_BYTES
        if self._in_pieces:
            self._got = bucket.memory("got", bucket.length, self._flat).view(ranks.size, 1, -1)
            self._works = [
                distributed.all_to_all_single(
                    self._got.view(-1), self._flat, group=ranks.group, async_op=True
                )
            ]
        else:
            sent = self._flat[None] if most == 1 else torch.stack(rows)
            self._got = sent.new_empty((ranks.size, *sent.shape))
            if sent.is_cpu:  # half the time of gloo's gathering
                sent = sent.expand(self._got.shape).contiguous()
                work = distributed.all_to_all_single(self._got, sent, group=ranks.group, async_op=True)
            else:
                work = distributed.all_gather(list(self._got), sent, group=ranks.group, async_op=True)
            self._works = [work]
            self._sent = sent  # alive until it is sent

    def go_on(self) -> None:
        """Sum what came, and begin to give a piece to everybody; ranks call it in one order."""
        if self._got is None:
            return
        from torch import distributed

        for work in self._works:
            work.wait()
        self._works = []
        nodes: list[tuple[Node, Tensor]] = []
        for rows, owned in zip(self._got, self._owned, strict=True):
            for row, node in zip(rows, owned, strict=False):
                nodes.append((node, row))
                join(nodes, self._ranks.parts, Tensor.add_)
        total, self._got = nodes[0][1], None
        if not self._in_pieces:
            self._flat.copy_(total)
            return
        pieces = list(self._flat.view(self._ranks.size, -1))
        group = self._ranks.group
        if total.device.type != "cpu":
            self._works = [distributed.all_gather(pieces, total, group=group, async_op=True)]
            return
        # gloo gathers by way of memory that it allocates: three times the time of a broadcast from each owner
        pieces[self._ranks.rank].copy_(total)
        self._works = [
            distributed.broadcast(piece, group_src=r, group=group, async_op=True)
            for r, piece in enumerate(pieces)
        ]

    def finish(self) -> list[Tensor | None]:
        """The sums; None where a tensor is None on all parts."""
        for work in self._works:
            work.wait()
        pairs = list(zip(self._own, self._views, strict=True))
        there = [(own, view) for own, view in pairs if own is not None]
        if there:
            torch._foreach_copy_([own for own, _ in there], [view for _, view in there])
        if len(there) == len(pairs):
            return self._own
        marks = self._flat[self._bucket.marks :].tolist()
        return [
            view.clone() if own is None and mark else own
            for (own, view), mark in zip(pairs, marks, strict=False)
        ]
