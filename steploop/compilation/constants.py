"""Tensors of the surroundings in a trace: what it writes into them is undone, and values read of them are noted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Untouched"]


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Watches the calls of a trace on real tensors: those that are neither the state's nor the batch's.

    Args:
        note: notes a value that Python reads of such a tensor: takes a function that gives it, and the value.
    """

    def __init__(self, note: Callable[[Callable[[], Any], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what will be written into; note what is read."""
        from torch.utils._python_dispatch import _disable_current_modes

        kwargs = kwargs or {}
        reads = torch.Tag.data_dependent_output in func.tags
        if reads or func._schema.is_mutable:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            real = [x for x in tensors if type(x) in {Tensor, torch.nn.Parameter}]
            with _disable_current_modes(), torch.no_grad():
                if real and reads and len(real) == len(tensors):
                    value = func(*args, **kwargs)
                    self._note(lambda: func(*args, **kwargs), value)
                    return value
                for x in real:
                    self._kept.setdefault(id(x), (x, x.detach().clone()))
        return func(*args, **kwargs)

    def put_back(self) -> None:
        """Give the tensors their values back."""
        for tensor, value in self._kept.values():
            if not torch.equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)
