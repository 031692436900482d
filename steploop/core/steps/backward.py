"""``backward_scaled``: compute the gradients of the scaled loss."""

from steploop.core.state.surroundings import shielded
from steploop.core.state.train_state import Gradients, TrainState
from steploop.core.steps.backward_pass import gradients, seed_of
from steploop.errors import StepOrderError

__all__ = ["backward_scaled"]


@shielded
def backward_scaled(state: TrainState) -> TrainState:
    """Compute the gradients of the loss times the loss scale.

    With L the loss, S the loss scale (1 without one) and w the parameters: grads = ∂(S L) / ∂w.

    The graph of the loss is used up: once per loss. ``.grad`` of every parameter is None afterwards.

    Returns:
        The state with ``grads``, one tensor of the parameter's shape for each parameter that the loss depends on.

    Raises:
        StepOrderError: there is no loss: ``forward_loss`` comes before.
        SpentStateError: the graph of this loss was used up, or ``state`` was given away.
    """
    state.check_alive("backward_scaled")
    graph = state._graph
    if graph is None:
        raise StepOrderError(
            "backward_scaled: this state has no loss to differentiate. Call forward_loss(state, batch, objective) before."
        )
    # activation checkpointing computes parts of the forward pass again: with this state's parameters
    module = state._machine.module
    before = module.point(state._lease, state._params)
    try:
        grads = gradients(state, graph, seed_of(state, graph))
    finally:
        if before is not None:
            module.place_params(before)
    return state.replace(_graph=None, _grads=Gradients(grads))
