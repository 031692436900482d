"""Turn the states that a traced step returned into outputs of the graph and a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import Reference
from steploop.compilation.host_numbers import Counter, HostNumber, plain_number
from steploop.compilation.leaves import Place, counted_on_host, name_of, places, plain_leaves
from steploop.compilation.plans import StatePlan
from steploop.compilation.traced_state import TracedState, results_of, untraced_names, unwatched
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import Schedules
from steploop.core.trees import map_tensors
from steploop.errors import CompileError, SteploopError

__all__ = ["FRESH", "SlotsGrew", "collect", "give", "template"]

# Not updated in place: a tensor of the user's own stands there, which may be one of a batch.
FRESH = {"carry"}


class SlotsGrew(SteploopError):  # noqa: N818  (it says what happened: nothing is wrong)
    """The optimizer made new slots, so this step must run eagerly once before it is captured."""


def collect(
    real: TrainState,
    old: TracedState,
    came: Mapping[Place, Tensor],
    new: TracedState,
    given: list[Any],
    *,
    before: Sequence[Schedules],
    after: Sequence[Schedules],
    limit: int,
) -> StatePlan:
    """Append one state's outputs to ``given``, and plan how the host rebuilds the state.

    A state whose tensors were donated has every changed tensor written into the one it came in; buffers too, which
    eager replaces: the graph then takes the same tensors at every step.

    Args:
        real: the state that the trace was made for.
        old: the traced state that went in; an optimizer may have put other tensors into its slots since.
        came: the tensors that went in.
        new: the state that came back.
        given: what the graph gives, so far.
        before: schedules that the step called before the optimizer.
        after: schedules that it called afterwards.
        limit: steps in a row that may be not finite.
    """
    _check_finished(new)
    donated = not old.alive
    tensors: dict[Place, Reference] = {}
    _check_slots(real, new)
    _check_plain(real, old, new)
    went = dict(places(new))
    if list(came) != list(went):
        raise CompileError(
            f"changed which parameters, buffers or averages the state holds: {_difference(came, went)}. Do that outside of the step."
        )
    with torch.no_grad():
        for place, tensor in came.items():
            result = went[place]
            if (result.shape, result.dtype) != (tensor.shape, tensor.dtype):
                raise CompileError(
                    f"changed the shape or dtype of {name_of(place)}, from {tuple(tensor.shape)} {tensor.dtype} to {tuple(result.shape)} {result.dtype}."
                )
            if not donated or place[0] in FRESH:
                tensors[place] = give(result, given)
            elif result is not tensor:
                tensor.copy_(result)
    attempts, batches = _offset(new, "attempted_steps"), _offset(new, "batch")
    on_host = counted_on_host(real)
    if on_host and attempts > 1:
        raise CompileError(
            f"takes {attempts} optimizer steps on one state; a compiled step takes one at most. Split it into several."
        )
    results = {name: getattr(new.flight, name) for name in results_of(new.flight)}
    fields: dict[str, Any] = {}
    if not on_host:
        fields |= {"applied_steps": new.applied_steps, "nonfinite_steps": new.nonfinite_steps}
        if new.scale is not None:
            fields |= {"scale": (new.scale.scale, new.scale.growth_tracker)}
    return StatePlan(
        donated=donated,
        on_host=on_host,
        attempts=attempts,
        batches=batches,
        given={name: template(value, given) for name, value in fields.items()},
        flight={name: template(value, given) for name, value in results.items()},
        tensors=tensors,
        before=tuple(before),
        after=tuple(after),
        changed={
            name: plain_number(unwatched(new.__dict__[name]))
            for name in untraced_names(type(real))
            if unwatched(new.__dict__[name]) is not old.__dict__[name]
        },
        limit=limit,
    )


def give(value: Any, given: list[Any]) -> Reference:
    """Append a tensor, or a number of the host's, to what a step gives."""
    given.append(value.detach() if isinstance(value, Tensor) else value)
    return Reference(len(given) - 1)


def template(tree: Any, given: list[Any]) -> Any:
    """A tree with references in the places of its tensors and of the numbers that the host computes."""
    return map_tensors(
        lambda t: give(t, given),
        tree,
        other=lambda x: give(x, given) if issubclass(type(x), HostNumber) else x,
    )


def _check_finished(new: TracedState) -> None:
    if new.flight.graph is not None or new.flight.grads is not None:
        missing = "optimizer_step" if new.flight.grads is not None else "backward_scaled and optimizer_step"
        raise CompileError(f"returned a state in the middle of a step. Call {missing} before returning it.")


def _check_slots(old: TrainState, new: TracedState) -> None:
    """Check that the slots' structure, and the plain numbers in them, did not change."""
    for name, slot in new.tensors.slots.items():
        before = old.tensors.slots.get(name, {})
        if list(before) != list(slot):
            raise SlotsGrew(f"the optimizer made new slots for {name}")
        for key, value in slot.items():
            if not isinstance(value, Tensor) and value is not before[key] and value != before[key]:
                optimizer = type(new.machine.optimizer).__name__
                raise CompileError(
                    f"uses {optimizer}, which counts in a Python number ({key!r} of {name}); a graph would count it once. "
                    "Take an optimizer of torch.optim that can be captured (see help(steploop.compile))."
                )
            if isinstance(value, Tensor) is not isinstance(before[key], Tensor):
                raise SlotsGrew(f"the optimizer made new slots for {name}")


def _check_plain(real: TrainState, old: TracedState, new: TracedState) -> None:
    """What the state holds in plain values must be as it was: a graph would change it once."""
    before, after = plain_leaves(real), plain_leaves(new)
    for place, value in after.items():
        if place[0] != "slots" and (place not in before or before[place] != value):
            raise CompileError(
                f"changes {name_of(place)}, which is a {type(value).__name__}; a graph would change it once. Keep it as a tensor."
            )
    for index, (was, now) in enumerate(zip(old.hyper, new.hyper, strict=True)):
        changed = [
            k
            for k, v in now.items()
            if k not in was or (v is not was[k] and not isinstance(v, Tensor) and v != was[k])
        ]
        if changed:
            raise CompileError(
                f"uses {type(new.machine.optimizer).__name__}, which counts in its groups ({changed[0]!r} of group {index}); a graph "
                "would count it once. Take an optimizer of torch.optim that can be captured (see help(steploop.compile))."
            )


def _offset(new: TracedState, name: str) -> int:
    count = new.__dict__[name]
    if not isinstance(count, Counter):
        raise CompileError(
            f"set {name} to {count!r}. Leave counting to optimizer_step, and set it outside of the step."
        )
    return count.offset


def _difference(came: Mapping[Place, Tensor], went: Mapping[Place, Tensor]) -> str:
    changed = [place for place in (*came, *went) if (place in came) != (place in went)]
    return name_of(changed[0]) if changed else "their order"
