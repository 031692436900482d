"""``forward_loss``: compute the loss of a batch; the first of the six step functions."""

from typing import Any

from steploop.core.state.surroundings import shielded
from steploop.core.state.train_state import TrainState
from steploop.core.steps.forward_pass import Objective, TrainingPasses

__all__ = ["forward_loss"]


@shielded
def forward_loss(state: TrainState, batch: Any, objective: Objective) -> TrainState:
    """Compute the loss of a batch, in training mode and in the state's precision.

    Everything random in the forward pass is a function of (seed, attempted_steps); the global generators are
    left where they were. Does not depend on the caller's grad mode, autocast, default dtype or on the mode the
    model was left in.

    Args:
        state: any living state.
        batch: whatever the objective takes; on the state's device.
        objective: ``objective(model, batch)`` gives ``loss``, ``(loss, outputs)`` or ``(loss, outputs, weight)``:
            the loss of shape () is a mean over ``weight`` samples or tokens; ``outputs`` is for metrics.

    Returns:
        The state with ``loss`` (shape (), detached), ``outputs`` (detached), and the buffers after this pass.

    Raises:
        ObjectiveError: what the objective returned cannot be trained on.
        OutOfMemoryError: the pass did not fit; ``state`` is intact.
        SpentStateError: ``state`` was given away.
    """
    state.check_alive("forward_loss")
    with TrainingPasses(state) as passes:
        loss, outputs, _ = passes.run(batch, objective)
        buffers = passes.buffers()
    return state.replace(
        loss=loss.detach(), outputs=outputs, _graph=loss, _buffers=buffers, _old_buffers=state._buffers,
        _grads=None, grad_norm=None, clipped_norm=None, finite=None,
    )  # fmt: skip
