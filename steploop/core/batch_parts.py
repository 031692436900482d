"""The parts that a global batch is cut into, each of which one process computes."""

from collections.abc import Callable, Iterator
from typing import Any

import attrs
from torch import Tensor

from steploop.core.ranks import Ranks
from steploop.core.trees import UNCOUNTED, count_samples, map_tensors
from steploop.errors import DataError

__all__ = ["Parts", "split_parts", "without_samples"]


@attrs.frozen(eq=False)
class Parts:
    """This process's parts of one global batch: ``forward_loss`` and ``accumulate`` take it in a batch's place.

    A part is what the objective takes; None, or one without samples, counts for nothing and is not computed. What a
    step does to a batch before it gives it to ``forward_loss`` it can do to parts: ``parts[key]`` and unpacking give the
    parts of a field, ``parts.chunk(2)`` and other methods act on each part, ``map`` applies any function to each part, and
    fields may be put together again.

    Attributes:
        batches: the parts, in memory of their own: a view into a larger tensor may compute other bits.
        numbers: the number of each among all parts of the global batch.
        total: how many parts the global batch has, over all processes.

    Example:
        >>> x, y = split_parts((torch.arange(4), torch.ones(4)), Ranks.here(parts=2))
        >>> x.batches
        (tensor([0, 1]), tensor([2, 3]))
        >>> x.map(len).batches
        (2, 2)
    """

    batches: tuple[Any, ...] = attrs.field(converter=tuple)
    numbers: range
    total: int

    def map(self, function: Callable[[Any], Any]) -> "Parts":
        """The parts that ``function`` makes of these; None stays None."""
        return self._with([None if batch is None else function(batch) for batch in self.batches])

    def _with(self, batches: Any) -> "Parts":
        return Parts(batches, self.numbers, self.total)

    def __getitem__(self, key: Any) -> "Parts":
        """The parts of a field."""
        return self.map(lambda batch: batch[key])

    def __getattr__(self, name: str) -> "Parts":
        """An attribute of each part, or its method: ``parts.chunk(2)`` is what it gives for each."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self.map(lambda batch: getattr(batch, name))

    def __call__(self, *args: Any, **kwargs: Any) -> "Parts":
        """What the method of each part gives."""
        return self.map(lambda method: method(*args, **kwargs))

    def __iter__(self) -> Iterator["Parts"]:
        """The parts of each field; a part that has fewer has None in the place of the others."""
        items = [() if batch is None else tuple(batch) for batch in self.batches]
        longest = max((len(item) for item in items), default=0)
        return iter([self._with([i[k] if k < len(i) else None for i in items]) for k in range(longest)])


def split_parts(batch: Any, ranks: Ranks) -> Parts:
    """Cut a global batch, which every process has, into parts, and copy those of this process.

    With n samples and P parts, part p has the samples p n // P up to (p + 1) n // P, without the last.

    Args:
        batch: a tree of tensors whose first axes are the samples, or a list of samples. What is no tensor and no list of
            as many things goes into every part.
        ranks: which parts to take.

    Raises:
        DataError: the samples cannot be counted.

    Example:
        >>> split_parts(torch.arange(5), Ranks(rank=1, size=2, parts=2)).batches
        (tensor([2, 3, 4]),)
    """
    samples = count_samples(batch)
    if samples is None and type(batch) is list:
        samples = len(batch)
    if samples is None:
        raise DataError(
            f"split_parts: {UNCOUNTED.split(' Return')[0]} Cut it yourself: Parts(batches, ranks.mine, ranks.parts)."
        )
    bounds = [samples * p // ranks.parts for p in range(ranks.parts + 1)]
    cuts = [(bounds[p], bounds[p + 1]) for p in ranks.mine]
    batches: list[Any] = [
        without_samples(batch, samples) if lo == hi else _cut(batch, lo, hi, samples) for lo, hi in cuts
    ]
    return Parts(batches, ranks.mine, ranks.parts)


def without_samples(batch: Any, samples: int) -> Any:
    """What a batch of ``samples`` samples looks like without any, for a part that has none; None where that is not known.

    A step can unpack it: a rank all of whose parts are empty has no other to see the fields in.
    """
    empty = _cut(batch, 0, 0, samples)
    return empty if count_samples(empty) == 0 else None


def _cut(tree: Any, start: int, stop: int, samples: int) -> Any:
    """The samples from ``start`` to ``stop`` of every tensor and list, copied."""
    if type(tree) is list and len(tree) == samples and not all(isinstance(item, Tensor) for item in tree):
        return tree[start:stop]
    if type(tree) is dict:
        return {key: _cut(value, start, stop, samples) for key, value in tree.items()}
    if type(tree) in {list, tuple}:
        return type(tree)(_cut(value, start, stop, samples) for value in tree)
    return map_tensors(lambda t: t[start:stop].clone() if t.dim() else t, tree)
