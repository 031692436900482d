"""Watch every module during one step, forward and backward, for values that are not finite."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import attrs
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steploop.core.trees import map_tensors, named_leaves
from steploop.tools.replay.tensor_stats import Stats, stats_of

__all__ = ["Call", "Event", "Operation", "StepWatch"]

Role = Literal["input", "output", "parameter"]
_PACKAGE = Path(__file__).parents[2]
_OURS = (str(_PACKAGE), str(Path(torch.__file__).parent))
_RECIPES = str(_PACKAGE / "_recipes")  # those that came with a wheel are the user's to read


@attrs.define(eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: of the module, as ``named_modules`` has it; "" for the model itself.
        kind: its class.
        parent: the call in whose code it happened, or None.
        inputs: what went in.
        outputs: what came out.
        gradients: what came back at its outputs in the backward pass.
    """

    name: str
    kind: str
    parent: "Call | None"
    inputs: list[Stats] = attrs.field(factory=list)
    outputs: list[Stats] = attrs.field(factory=list)
    gradients: list[Stats] = attrs.field(factory=list)


@attrs.frozen(eq=False)
class Event:
    """A tensor that was seen to be non-finite.

    Attributes:
        backward: whether it is a gradient.
        role: what it is to the call.
        call: whose it is; for a parameter, a call that stands for its module.
        stats: what is in it.
        trained: whether a gradient flows through it (a mask of -inf has none).
    """

    backward: bool
    role: Role
    call: Call
    stats: Stats
    trained: bool = True


@attrs.frozen(eq=False)
class Operation:
    """An operation of torch that made a non-finite value from finite ones.

    Attributes:
        name: such as ``aten.log``.
        place: file, line and text of the code outside of torch and steploop that called it; "" in the backward pass.
        call: in which module's call, or None.
        backward: whether it ran in the backward pass.
    """

    name: str
    place: str
    call: Call | None
    backward: bool


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class StepWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records every module call of some models, and every value that is not finite.

    Args:
        models: name of the state ("" for the only one) -> its model, pointing at the state's parameters.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._models = models
        self._handles: list[Any] = []
        self._stack: list[Call] = []
        self._looking = False
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.operations: list[Operation] = []

    def __enter__(self) -> Self:
        """Install the hooks."""
        for state, model in self._models.items():
            for name, module in model.named_modules():
                label = ".".join(part for part in (state, name) if part)
                self._handles.append(module.register_forward_pre_hook(self._before(label), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._after()))
                for own, param in module.named_parameters(recurse=False):
                    if param.requires_grad:
                        self._watch_parameter(param, label, type(module).__name__, own)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for handle in self._handles:
            handle.remove()

    # -- modules --------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = Call(name, type(module).__name__, self._stack[-1] if self._stack else None)
            self.calls.append(call)
            self._stack.append(call)
            own: dict[int, Tensor] = {}  # the same tensor given twice stays the same: attention looks at that

            def seen(tensor: Tensor) -> Tensor:
                if not _is_real(tensor):
                    return tensor
                if id(tensor) not in own:
                    self._note(call, "input", call.inputs, tensor)
                    # a view of its own, so that its gradient is what this call gives back and no other
                    own[id(tensor)] = (
                        self._with_gradient(call, "input", tensor.view_as(tensor))
                        if tensor.requires_grad and torch.is_grad_enabled()
                        else tensor
                    )
                return own[id(tensor)]

            return map_tensors(seen, args), map_tensors(seen, kwargs)

        return hook

    def _after(self) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            del args
            call = self._stack.pop()
            for _name, leaf in named_leaves(output):
                if _is_real(leaf):
                    self._note(call, "output", call.outputs, leaf)
                    if leaf.requires_grad:
                        self._with_gradient(call, "output", leaf)

        return hook

    def _note(self, call: Call, role: Role, into: list[Stats], tensor: Tensor) -> None:
        stats = self._measured(f"{role} {len(into)}" if role == "input" else role, tensor)
        into.append(stats)
        if not stats.finite:
            self.events.append(
                Event(backward=False, role=role, call=call, stats=stats, trained=tensor.requires_grad)
            )

    def _with_gradient(self, call: Call, role: Role, tensor: Tensor) -> Tensor:
        def hook(grad: Tensor) -> None:
            stats = self._measured(f"gradient at its {role}", grad)
            if role == "output":
                call.gradients.append(stats)
            if not stats.finite:
                self.events.append(Event(backward=True, role=role, call=call, stats=stats))

        tensor.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return tensor

    def _watch_parameter(self, param: Tensor, name: str, kind: str, own: str) -> None:
        def hook(grad: Tensor) -> None:
            stats = self._measured(f"gradient of {own}", grad)
            if not stats.finite:
                calls = [c for c in self.calls if c.name == name]
                self.events.append(
                    Event(
                        backward=True,
                        role="parameter",
                        call=calls[-1] if calls else Call(name, kind, None),
                        stats=stats,
                    )
                )

        self._handles.append(param.register_hook(hook))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _measured(self, name: str, tensor: Tensor) -> Stats:
        self._looking = True  # our own arithmetic is not the step's
        try:
            return stats_of(name, tensor)
        finally:
            self._looking = False

    # -- operations -----------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record the first that makes a non-finite value."""
        # asked before: an operation in place makes its own input bad
        looking = not self._looking and len(self.operations) < 100 and not _bad((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if looking and _bad(result):
            backward = torch._C._current_graph_task_id() != -1
            call = self._stack[-1] if self._stack and not backward else None
            self.operations.append(
                Operation(str(func.overloadpacket), "" if backward else _place(), call, backward)
            )
        return result


def _bad(tree: Any) -> bool:
    leaves = (leaf for _, leaf in named_leaves(tree) if _is_real(leaf) and not leaf.is_sparse)
    return any(not bool(torch.isfinite(leaf).all()) for leaf in leaves)


def _place() -> str:
    """Return the innermost line on the stack that is neither torch's nor steploop's."""
    import linecache

    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_RECIPES) or not name.startswith((*_OURS, "<")):
            text = linecache.getline(name, frame.f_lineno).strip()
            return f"{Path(name).name}, line {frame.f_lineno}: {text}"
        frame = frame.f_back
    return ""
