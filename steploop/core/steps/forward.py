"""``forward_loss``: compute the loss of a batch; the first of the six step functions."""

from typing import Any

from torch import Tensor

from steploop.core.batch_parts import Parts
from steploop.core.state.parts import Began, InFlight
from steploop.core.state.surroundings import shielded_sums
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.part_agreement import agree, mean_buffers
from steploop.core.steps.by_parts.part_passes import parts_of, run_parts
from steploop.core.steps.by_parts.sharded_steps import require_weights
from steploop.core.steps.forward_pass import DrewElsewhere, TrainingPasses
from steploop.core.steps.objectives import Objective

__all__ = ["after_passes", "forward_loss"]


@shielded_sums
def forward_loss(
    state: TrainState, batch: Any, objective: Objective, *, keep_graph: bool = False
) -> TrainState:
    """Compute the loss of a batch, in training mode and in the state's precision.

    Everything random in the forward pass is a function of (seed, attempted_steps, number of the pass in this step):
    torch's, Python's and NumPy's generators, which are left where they were. Does not depend on the caller's grad mode,
    autocast, default dtype or on the mode the model was left in.

    Args:
        state: any living state.
        batch: whatever the objective takes; on the state's device.
        objective: ``objective(model, batch)`` gives ``loss``, ``(loss, outputs)`` or ``(loss, outputs, weight)``:
            the loss of shape () is a mean over ``weight`` samples or tokens; ``outputs`` is for metrics.
        keep_graph: leave the outputs their graph, so that a later pass of the same step can be differentiated
            through them: a batch of a GAN's generator, made once and used by both updates.

    Returns:
        The state with ``loss`` (shape (), detached), ``outputs`` (detached), and the buffers after this pass.

    Raises:
        ObjectiveError: what the objective returned cannot be trained on, or it called ``backward()`` itself.
        ConfigError: the model was changed behind the state.
        OutOfMemoryError: the pass did not fit; ``state`` is intact.
        SpentStateError: ``state`` was given away.

    Example:
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
        >>> state = forward_loss(state, torch.ones(4, 2), lambda model, batch: model(batch).square().mean())
        >>> state.loss.shape
        torch.Size([])
    """
    state.check_alive("forward_loss")
    if state.machine.ranks is not None or type(batch) is Parts:
        return _of_parts(state, parts_of(state, batch, "forward_loss"), objective, keep_graph=keep_graph)
    try:
        passes, loss, outputs, began = _pass(state, batch, objective, keep_graph=keep_graph)
    except DrewElsewhere:  # it left no trace, and is taken again with all generators seeded
        passes, loss, outputs, began = _pass(state, batch, objective, keep_graph=keep_graph)
    flight = state.flight.begun(
        loss=loss.detach(), outputs=outputs, graph=loss, began=began, passes=state.flight.passes + 1,
        known=state.flight.known,
    )  # fmt: skip
    return after_passes(state, passes, flight, "forward_loss")


def _pass(
    state: TrainState, batch: Any, objective: Objective, *, keep_graph: bool
) -> tuple[TrainingPasses, Tensor, Any, Began]:
    with TrainingPasses(state) as passes:
        loss, outputs, _ = passes.run(batch, objective, keep_graph=keep_graph)
        return passes, loss, outputs, passes.end()


def _of_parts(state: TrainState, parts: Parts, objective: Objective, *, keep_graph: bool) -> TrainState:
    try:
        ran = run_parts(state, parts, objective, keep_graph=keep_graph)
    except DrewElsewhere:  # before anything was said to the other ranks
        ran = run_parts(state, parts, objective, keep_graph=keep_graph)
    agreed = agree(state, ran.ran, "forward_loss")
    if state.machine.module.sharded is not None:
        require_weights(agreed.shares, agreed.ran, "forward_loss")
    flight = type(state.flight)(
        loss=agreed.loss, outputs=ran.outputs(), graph=ran.graphs(agreed), began=ran.began,
        passes=state.flight.passes + parts.total, known=state.flight.known,
    )  # fmt: skip
    return state.replace(
        tensors=state.tensors.replace(buffers=mean_buffers(state, agreed, ran.ran)), flight=flight
    )


def after_passes(state: TrainState, passes: TrainingPasses, flight: InFlight, by: str) -> TrainState:
    """The state after forward passes; it takes the tensors over where the model changed trained ones in place."""
    if not passes.updated_in_place:
        return state.replace(tensors=passes.tensors, flight=flight)
    state.lease.tear()
    return state.replace(tensors=passes.tensors, flight=flight, generation=state.lease.hand_on(by))
