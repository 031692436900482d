"""Find the module, or the code around it, that first made a non-finite value in a watched step."""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.core.trees import named_leaves
from steploop.tools.replay.module_watch import Call, Event, Operation, StepWatch
from steploop.tools.replay.tensor_stats import Stats, stats_of

__all__ = ["Finding", "broken_before", "judge"]

Phase = Literal["state", "batch", "forward", "objective", "backward", "norm"]


@attrs.frozen(kw_only=True)
class Finding:
    """The origin of the first value that is not finite.

    Attributes:
        phase: "state": it was there before the step; "batch": it came with the data; "forward" and "backward": a
            module made it; "objective": the code of the objective did, outside of every module; "norm": every gradient
            is finite, but their norm overflows.
        backward: whether it was in the backward pass.
        module: the name of the module, "" for the model itself; None where it is none.
        kind: the module's class, or None.
        what: one sentence.
        went_in: what the culprit was given.
        came_out: what it made of that.
        operation: the operation of torch that did it, where one is known.
        place: the line of code that called it; "" where it is not known.
    """

    phase: Phase
    backward: bool = False
    module: str | None = None
    kind: str | None = None
    what: str
    went_in: tuple[Stats, ...] = ()
    came_out: tuple[Stats, ...] = ()
    operation: str | None = None
    place: str = ""


def broken_before(states: Mapping[str, TrainState]) -> Finding | None:
    """A value that was not finite before the step began."""
    for owner, one in states.items():
        for name, value in (*one.params.items(), *one.buffers.items()):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                full = ".".join(part for part in (owner, name) if part)
                seen = stats_of(full, value)
                what = f"{full} was not finite before the step began: an earlier step or the initialisation made it so."
                return Finding(phase="state", what=what, module=full.rpartition(".")[0], came_out=(seen,))
    return None


def _in_batch(batch: Any) -> tuple[Stats, ...]:
    """List the tensors of a batch that are not finite."""
    found = [
        stats_of(f"batch {name}".strip(), leaf)
        for name, leaf in named_leaves(batch)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return tuple(stats for stats in found if not stats.finite)


def judge(watch: StepWatch, batch: Any, *, loss_finite: bool) -> Finding:
    """Find who was first, from the record of a watched step.

    Forward: the first module whose output is not finite although what went in was. Backward: the first call that gives
    back a gradient that is not finite although the one that came to it was; what lies between two modules is the code
    of the module around them, or of the objective.
    """
    forward = [] if loss_finite else [e for e in watch.events if not e.backward and _counts(e)]
    if forward:
        return _judged_forward(forward[0], watch, batch)
    if not loss_finite:
        roots = [call for call in watch.calls if call.parent is None]
        seen = tuple(stats for call in roots for stats in call.outputs)
        if broken := _in_batch(batch):
            return Finding(
                phase="batch",
                what="The batch itself is not finite, and the objective uses it.",
                came_out=broken,
            )
        what = "Every module gave finite outputs; the objective made the loss out of them, and the loss is not finite."
        return _with_operation(
            Finding(phase="objective", what=what, went_in=seen), watch, None, backward=False
        )
    backward = [e for e in watch.events if e.backward]
    if backward:
        return _judged_backward(backward[0], watch)
    what = "Every gradient is finite, but their global norm overflows: the gradients are far too large."
    return Finding(phase="norm", backward=True, what=what)


def _counts(event: Event) -> bool:
    """Whether a value is a failure; -inf alone may be a mask."""
    stats = event.stats
    if stats.nan or stats.pos_inf:
        return True
    absorbed = (
        event.role == "input" and bool(event.call.outputs) and all(out.finite for out in event.call.outputs)
    )
    return event.trained and not absorbed


def _judged_forward(event: Event, watch: StepWatch, batch: Any) -> Finding:
    call = event.call
    if event.role == "input":
        if call.parent is None and (broken := _in_batch(batch)):
            return Finding(phase="batch", what="The batch itself is not finite.", came_out=broken)
        if call.parent is None:
            what = f"The objective gave {_named(call)} an input that is not finite."
            return _with_operation(
                Finding(phase="objective", what=what, came_out=(event.stats,)), watch, None, backward=False
            )
        around = call.parent
        what = f"{_named(around)} made it in its own forward code, before it called {_named(call)}."
        found = _finding("forward", around, what, around.inputs, [event.stats])
        return _with_operation(found, watch, around, backward=False)
    what = f"{_named(call)} made it in the forward pass: its inputs were finite, its output is not."
    return _with_operation(
        _finding("forward", call, what, call.inputs, call.outputs), watch, call, backward=False
    )


def _judged_backward(event: Event, watch: StepWatch) -> Finding:
    call: Call | None = event.call
    if event.role == "output":  # what arrives at a call was made by the code behind it
        behind, call = _named(event.call), event.call.parent
        if call is None:
            what = f"The objective made it in the backward pass: the gradient that reaches {behind} is not finite."
            found = Finding(
                phase="objective",
                backward=True,
                what=what,
                went_in=tuple(event.call.outputs),
                came_out=(event.stats,),
            )
            return _with_operation(found, watch, None, backward=True)
        what = f"{_named(call)} made it in the backward pass of its own forward code, behind {behind}."
    else:
        assert call is not None  # noqa: S101  (an event has one; the other branch may have set it to None)
        what = f"{_named(call)} made it in the backward pass: the gradient that came to it was finite, what it gave back is not."
    found = _finding("backward", call, what, [*call.inputs, *call.gradients], [event.stats])
    return _with_operation(found, watch, call, backward=True)


def _named(call: Call) -> str:
    return f"{call.name} ({call.kind})" if call.name else f"the model ({call.kind})"


def _finding(phase: Phase, call: Call, what: str, went_in: list[Stats], came_out: list[Stats]) -> Finding:
    return Finding(
        phase=phase,
        backward=phase == "backward",
        module=call.name,
        kind=call.kind,
        what=what[0].upper() + what[1:] if what.startswith("the ") else what,
        went_in=tuple(went_in),
        came_out=tuple(came_out),
    )


def _with_operation(finding: Finding, watch: StepWatch, call: Call | None, *, backward: bool) -> Finding:
    """Add the first operation of torch in the culprit's code that made a non-finite value."""

    def fits(operation: Operation) -> bool:
        return operation.backward is backward and (backward or operation.call is call)

    found = next((operation for operation in watch.operations if fits(operation)), None)
    return finding if found is None else attrs.evolve(finding, operation=found.name, place=found.place)
