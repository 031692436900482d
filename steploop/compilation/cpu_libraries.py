"""Which of torch's libraries for the CPU are switched on: how the result of a convolution lies in memory depends on it.

torch remembers what a call on fake tensors gave, and looks at the tensors only: what it remembers from before a switch
is wrong afterwards, and whoever reads a result by it reads other entries.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forget_if_switched", "libraries", "without_mkldnn"]


def libraries() -> tuple[bool, bool]:
    """Whether oneDNN and NNPACK are switched on (``torch.backends.mkldnn``, ``torch.backends.nnpack``)."""
    return torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()


_seen = [libraries()]  # when fake tensors were computed with last


def forget_if_switched() -> None:
    """Let torch forget what calls on fake tensors gave, if a library was switched since."""
    if (now := libraries()) != _seen[0]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        _seen[0] = now
        FakeTensorMode.cache_clear()


@contextmanager
def without_mkldnn() -> Iterator[None]:
    """Switch oneDNN off for a ``with`` block."""
    # torch.backends.mkldnn.flags sets more, and warns of what it sets
    was = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # noqa: FBT003  (it takes no keyword)
    try:
        forget_if_switched()
        yield
    finally:
        torch._C._set_mkldnn_enabled(was)
        forget_if_switched()
