"""Sums over the parts of a batch by one fixed binary tree, in one process or over many: the same bits."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.errors import ConfigError

__all__ = ["PartSum", "bucketed"]

# A node of the tree: the parts from the first number up to the second, without that one.
_Node = tuple[int, int]
_Values = list[Tensor | None]

_BUCKET_BYTES = 32 << 20
_ALIGNED_BYTES = 64  # as torch allocates: kernels may sum in another order where memory begins elsewhere


@functools.cache
def _parents(total: int) -> dict[_Node, _Node]:
    """Each node's parent in the tree over ``total`` parts, every node of which is cut in the middle."""
    found: dict[_Node, _Node] = {}
    nodes = [(0, total)]
    for start, stop in nodes:
        if stop - start > 1:
            middle = (start + stop) // 2
            halves = [(start, middle), (middle, stop)]
            found |= dict.fromkeys(halves, (start, stop))
            nodes += halves
    return found


def _join(nodes: list[tuple[_Node, Any]], total: int, add: Callable[[Any, Any], Any]) -> None:
    """Add the last two values as long as their nodes are the halves of one."""
    parents = _parents(total)
    while len(nodes) > 1 and parents.get(nodes[-2][0]) == parents.get(nodes[-1][0], 0):
        (node, right), (_, left) = nodes.pop(), nodes.pop()
        nodes.append((parents[node], add(left, right)))


@functools.cache
def _nodes_of(numbers: range, total: int) -> tuple[_Node, ...]:
    """The largest nodes that the parts ``numbers`` make up."""
    nodes: list[tuple[_Node, Any]] = []
    for number in numbers:
        nodes.append(((number, number + 1), None))
        _join(nodes, total, lambda *_: None)
    return tuple(node for node, _ in nodes)


def _added(left: _Values, right: _Values) -> _Values:
    """The sum of two lists in the memory of one of them; None counts as zeros, which turn -0.0 into 0.0."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    for a, b in zip(left, right, strict=True):
        if (alone := a if b is None else b) is not None and (a is None or b is None):
            alone.add_(0)
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


class PartSum:
    """A sum over the parts of lists of tensors, which it takes over: this process's, in the order of their numbers.

    Where a tensor is None on some parts it counts as zeros there; where it is None on all, the sum is None.

    Args:
        ranks: who has the other parts.
        like: one tensor for each place of the lists: of its shape, dtype and layout.
    """

    def __init__(self, ranks: Ranks, like: Sequence[Tensor]) -> None:
        self._ranks = ranks
        self._like = like
        self._nodes: list[tuple[_Node, _Values]] = []

    def add(self, number: int, values: _Values) -> None:
        """Count the values of part ``number`` in."""
        if any(v is not None and v.layout is not torch.strided for v in values):
            raise ConfigError(
                "A step with ranks sums the gradients of parts, and cannot sum sparse ones (nn.Embedding(sparse=True)). Use a "
                "dense embedding."
            )
        self._nodes.append(((number, number + 1), values))
        _join(self._nodes, self._ranks.parts, _added)

    def result(self) -> _Values:
        """The sum over all parts of all processes."""
        if self._ranks.size == 1:
            return self._nodes[0][1]
        return _summed(self._ranks, self._like, self._nodes)


@attrs.frozen(eq=False)
class _Bucket:
    """Some tensors behind one another in flat memory, and after them for each in how many parts it is not None.

    Attributes:
        places: which tensors.
        starts: where each begins, in elements.
        marks: where the counts begin.
        length: in elements; a multiple of the number of ranks.
        dtype: of its tensors.
    """

    places: tuple[int, ...]
    starts: tuple[int, ...]
    marks: int
    length: int
    dtype: torch.dtype

    def views(self, flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in flat memory, laid out as autograd lays out the gradient of each."""
        found = []
        for place, start in zip(self.places, self.starts, strict=True):
            t = like[place]
            strides = t.stride() if _dense(t) else torch.empty(t.shape, device="meta").stride()
            found.append(flat.as_strided(t.shape, strides, start))
        return found

    def fill(self, flat: Tensor, values: _Values, like: Sequence[Tensor]) -> None:
        """Write values into flat memory; None as zeros."""
        views = self.views(flat, like)
        given = [values[place] for place in self.places]
        pairs = [(view, value) for view, value in zip(views, given, strict=True) if value is not None]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [value for _, value in pairs])
        for view, value in zip(views, given, strict=True):
            if value is None:
                view.zero_()
        flat[self.marks :] = 0
        there = torch.tensor([value is not None for value in given], dtype=self.dtype)
        flat[self.marks : self.marks + len(given)] = there

    def read(self, flat: Tensor, values: _Values, like: Sequence[Tensor]) -> list[tuple[int, Tensor | None]]:
        """Place and sum of each tensor; None where it was None on all parts."""
        views: list[Tensor | None] = [*self.views(flat, like)]
        if any(values[place] is None for place in self.places):
            there = flat[self.marks : self.marks + len(views)].tolist()
            views = [view if found else None for view, found in zip(views, there, strict=True)]
        return list(zip(self.places, views, strict=True))


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


def _rounded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


def bucketed(like: Sequence[Tensor], ranks: int, limit: int = _BUCKET_BYTES) -> list[_Bucket]:
    """Put tensors into buckets of about ``limit`` bytes: the last ones, whose gradients are there first, first."""
    groups: list[list[int]] = []
    opened: dict[torch.dtype, tuple[list[int], int]] = {}
    for place in reversed(range(len(like))):
        t = like[place]
        members, size = opened.get(t.dtype, (None, 0))
        if members is None or size + t.nbytes > limit:
            groups.append(members := [])
            size = 0
        members.append(place)
        opened[t.dtype] = (members, size + t.nbytes)
    buckets = []
    for members in groups:
        dtype = like[members[0]].dtype
        aligned = _ALIGNED_BYTES // dtype.itemsize
        starts, end = [], 0
        for place in members:
            starts.append(end)
            end += _rounded(like[place].numel(), aligned)
        length = _rounded(end + len(members), ranks * aligned)
        buckets.append(_Bucket(tuple(members), tuple(starts), end, length, dtype))
    return buckets


def _summed(ranks: Ranks, like: Sequence[Tensor], nodes: list[tuple[_Node, _Values]]) -> _Values:
    """Send each rank its piece of every bucket, let it sum, and gather the sums: an all-reduce in a fixed order."""
    result: _Values = [None] * len(like)
    there = [next((v for _, values in nodes if (v := values[i]) is not None), None) for i in range(len(like))]
    running = [(bucket, _Exchange(ranks, bucket, like, nodes)) for bucket in bucketed(like, ranks.size)]
    for _, exchange in running:
        exchange.sum_piece()
    for bucket, exchange in running:
        for place, value in bucket.read(exchange.finished(), there, like):
            result[place] = value
    return result


class _Exchange:
    """The sum of one bucket over ranks, under way."""

    def __init__(
        self, ranks: Ranks, bucket: _Bucket, like: Sequence[Tensor], nodes: Iterable[tuple[_Node, _Values]]
    ) -> None:
        from torch import distributed

        self._ranks = ranks
        device = like[bucket.places[0]].device
        rows = [torch.empty(bucket.length, dtype=bucket.dtype, device=device) for _ in nodes]
        for flat, (_, values) in zip(rows, nodes, strict=True):
            bucket.fill(flat, values, like)
        self._flat = rows[0]
        if not ranks.exact:
            for row in rows[1:]:
                self._flat += row
            self._work: Any = distributed.all_reduce(self._flat, group=ranks.group, async_op=True)
            return
        self._nodes = [_nodes_of(attrs.evolve(ranks, rank=r).mine, ranks.parts) for r in range(ranks.size)]
        most = max(map(len, self._nodes))
        piece = bucket.length // ranks.size
        sent = self._flat
        if most > 1:  # the parts of a rank are no single node: it sends several
            rows += [rows[0]] * (most - len(rows))
            sent = torch.stack([row.view(ranks.size, piece) for row in rows], dim=1).contiguous()
        self._got = torch.empty((ranks.size, most, piece), dtype=bucket.dtype, device=device)
        self._work = distributed.all_to_all_single(
            self._got.view(-1), sent.view(-1), group=ranks.group, async_op=True
        )
        self._sent = sent

    def sum_piece(self) -> None:
        """Sum this rank's piece and begin to gather all of them."""
        from torch import distributed

        if not self._ranks.exact:
            return
        self._work.wait()
        del self._sent
        nodes: list[tuple[_Node, Tensor]] = []
        for rows, owned in zip(self._got, self._nodes, strict=True):
            for row, node in zip(rows, owned, strict=False):
                nodes.append((node, row))
                _join(nodes, self._ranks.parts, Tensor.add_)
        self._piece = nodes[0][1]
        pieces = list(self._flat.view(self._ranks.size, -1))
        self._work = distributed.all_gather(pieces, self._piece, group=self._ranks.group, async_op=True)

    def finished(self) -> Tensor:
        """The sum, in flat memory."""
        self._work.wait()
        return self._flat
