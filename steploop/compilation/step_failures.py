"""Refuse batches that a graph would corrupt, and name the gradient that ends a compiled run."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor

from steploop.compilation.leaves import places
from steploop.compilation.plans import StepPlan
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError, NonFiniteError

__all__ = ["raise_nonfinite", "refuse_shared"]


def raise_nonfinite(
    train_step: Callable[[Any, Any], Any],
    state: Any,
    states: Sequence[TrainState],
    new: Sequence[TrainState],
    batch: Any,
) -> NoReturn:
    """Repeat the skipped step eagerly, to name the gradient that is not finite.

    Args:
        train_step: as it was written.
        state: what went in; only its names are read.
        states: that went in.
        new: that came out.
        batch: of the step.
    """
    again = [
        n.clone().replace(
            attempted_steps=s.attempted_steps,
            batch=s.batch,
            nonfinite_steps=s.nonfinite_steps,
            scale=s.scale,
        )
        for s, n in zip(states, new, strict=True)
    ]
    train_step(again[0] if isinstance(state, TrainState) else dict(zip(state, again, strict=True)), batch)
    raise NonFiniteError(
        f"{max(int(n.nonfinite_steps) for n in new)} steps in a row had gradients that were not finite when compiled; in eager "
        "the last one is finite. Lower the learning rate, clip, or train without compiling.",
        state=new[0] if isinstance(state, TrainState) else None,
    )


def refuse_shared(plan: StepPlan, states: Sequence[TrainState], batch: Sequence[Tensor]) -> None:
    """Refuse batches whose tensors share memory with the states', or with each other where the step writes into one."""
    own = [t for state in states for _, t in places(state)]
    inputs = {t.untyped_storage().data_ptr() for t in batch if t.numel()}
    if inputs & {t.untyped_storage().data_ptr() for t in own if t.numel()}:
        raise CompileError("is given a batch that shares memory with the state. Pass a clone.")
    if any(index < len(batch) for index in plan.graph.outline.written):
        raise CompileError("changes a tensor of the batch in place. Work on a copy: x = x.clone().")
