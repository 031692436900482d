"""Find two tensors in the same memory, by their addresses, without reading a value."""

from collections.abc import Iterator, Mapping

import attrs
import torch
from torch import Tensor

__all__ = ["shared_memory"]


@attrs.frozen(eq=False)
class _Span:
    """A tensor and the bytes of its storage between its first element and its last."""

    start: int
    end: int
    name: str
    is_param: bool
    tensor: Tensor


def shared_memory(params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two tensors of which some element is the same memory, at least one of them a parameter; or None.

    A parameter that stands in several places of a module is one tensor, and is in ``params`` once. Slices of one
    storage that do not meet are no harm, nor are buffers that do.

    Costs two microseconds a tensor, unless many lie in one storage.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in (*params.items(), *buffers.items()):
        if _has_address(tensor):
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for address, tensors in by_storage.items():
        if address and len(tensors) > 1:  # one without memory, as on the meta device, is at 0
            for one, other in _overlapping([_span(name, t, name in params) for name, t in tensors]):
                if (one.is_param or other.is_param) and _meet(one.tensor, other.tensor):
                    return one.name, other.name
    return None


def _has_address(tensor: Tensor) -> bool:
    """Whether a tensor has an address: sparse tensors and wrappers have none."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and tensor.numel() > 0


def _span(name: str, tensor: Tensor, is_param: bool) -> _Span:
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = int(tensor.storage_offset()), tensor.element_size()
    return _Span(start * size, (start + reach) * size, name, is_param, tensor)


def _overlapping(spans: list[_Span]) -> Iterator[tuple[_Span, _Span]]:
    """Yield every two whose byte ranges overlap, gaps included."""
    reached: list[_Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        reached = [before for before in reached if before.end > span.start]
        yield from ((before, span) for before in reached)
        reached.append(span)


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage share a byte; columns of a matrix overlap but share none."""
    marks = torch.zeros(one.untyped_storage().nbytes(), dtype=torch.bool)
    _bytes_of(marks, one).fill_(True)  # noqa: FBT003  (its only parameter)
    return bool(_bytes_of(marks, other).any())


def _bytes_of(marks: Tensor, tensor: Tensor) -> Tensor:
    """Mark the bytes that a tensor's elements take."""
    size = tensor.element_size()
    strides = [size * stride for stride in tensor.stride()]
    return marks.as_strided((*tensor.shape, size), (*strides, 1), size * tensor.storage_offset())
