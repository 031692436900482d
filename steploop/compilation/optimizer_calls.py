"""Rewrite optimizers' calls that need a Python number so that they take a tensor, while tracing."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steploop.compilation.host_numbers import HostNumber, fed, holds_numbers
from steploop.errors import CompileError

__all__ = ["TensorScalars"]

_SUMS: dict[Any, Any] = {
    Tensor.add: Tensor.add, Tensor.add_: Tensor.add_, torch.add: torch.add,
    Tensor.sub: Tensor.sub, Tensor.sub_: Tensor.sub_, torch.sub: torch.sub,
}  # fmt: skip
_PRODUCTS: dict[Any, Any] = {
    Tensor.addcmul: (Tensor.add, torch.mul), Tensor.addcmul_: (Tensor.add_, torch.mul), torch.addcmul: (torch.add, torch.mul),
    Tensor.addcdiv: (Tensor.add, torch.div), Tensor.addcdiv_: (Tensor.add_, torch.div), torch.addcdiv: (torch.add, torch.div),
}  # fmt: skip
_FOREACH_SUMS: dict[Any, Any] = {
    torch._foreach_add_: torch._foreach_add_,
    torch._foreach_add: torch._foreach_add,
}
# what a traced tensor cannot answer, and calls that make a tensor of a number
_SHOWN = {Tensor.__repr__, Tensor.__format__, Tensor.__str__}
_MADE = {torch.tensor, torch.as_tensor, torch.scalar_tensor}
# by name: a comparison comes as the method or as its operator, which are different objects
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


class TensorScalars(TorchFunctionMode):
    """Lets a hyperparameter be a tensor of shape () wherever optimizers expect a number.

    The learning rate is an input of the graph, or every step would be another graph. ``p.add_(g, alpha=lr)`` would
    read it; here it becomes ``p.add_(g * lr)``. A comparison with a number (``momentum != 0``) is answered by the
    value that the hyperparameter has while tracing: optimizers ask it to choose a formula.

    Attributes:
        values: id of a hyperparameter's tensor -> its value on the host; the trace fills it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, Any] = {}
        self._answers: dict[Any, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer or rewrite the calls above; pass every other call on."""
        named = dict(kwargs or {})
        if func in _SHOWN:
            raise CompileError(
                "shows a tensor (print, str(), a format), which has no value while a graph is captured and would be shown once. "
                "Show it after the step, from state.outputs."
            )
        if holds_numbers((*args, *named.values())):
            if func in _MADE and issubclass(type(args[0]), HostNumber):
                return args[0].tensor().to(**named)
            args, named = fed(args), fed(named)
        compare = _COMPARISONS.get(getattr(func, "__name__", "").strip("_"))
        if compare is not None and len(args) == 2:
            left, right = (self.values.get(id(a), a) for a in args)
            if not isinstance(left, Tensor) and not isinstance(right, Tensor):
                key = (*map(id, args), compare)  # an optimizer asks again for every parameter
                if key not in self._answers:
                    self._answers[key] = compare(left, right)
                return self._answers[key]
        if func in _SUMS and isinstance(alpha := named.get("alpha"), Tensor):
            del named["alpha"]
            # promoted before it multiplies, as the sum itself would
            other = args[1].to(torch.result_type(args[0], args[1]))
            return _SUMS[func](args[0], other * alpha, **named)
        if func in _FOREACH_SUMS and isinstance(alpha := named.get("alpha"), Tensor):
            return _FOREACH_SUMS[func](args[0], torch._foreach_mul(args[1], alpha))
        if func in _PRODUCTS and isinstance(value := named.get("value"), Tensor):
            total, combined = _PRODUCTS[func]
            return total(args[0], combined(args[1], args[2]) * value)
        return func(*args, **named)
