"""``backward_scaled``: compute the gradients of the scaled loss."""

from steploop.core.state.parts import Gradients
from steploop.core.state.surroundings import shielded_sums
from steploop.core.state.train_state import TrainState
from steploop.core.steps.backward_pass import gradients, recomputed, require_some, seed_of
from steploop.core.steps.by_parts.part_passes import PartGraphs, part_gradients
from steploop.errors import StepOrderError

__all__ = ["backward_scaled"]


@shielded_sums
def backward_scaled(state: TrainState, *, keep_graph: bool = False) -> TrainState:
    """Compute the gradients of the loss times the loss scale.

    With L the loss, S the loss scale (1 without one) and w the parameters: grads = ∂(S L) / ∂w.

    The graph of the loss is used up: once per loss. ``.grad`` of every parameter is None afterwards.

    Args:
        state: holds a loss: ``forward_loss`` comes before.
        keep_graph: keep the graph for a later backward pass of the same step through outputs that were kept with
            ``forward_loss(..., keep_graph=True)``.

    Returns:
        The state with ``grads``, one tensor of the parameter's shape for each parameter that the loss depends on.

    Raises:
        StepOrderError: there is no loss: ``forward_loss`` comes before.
        ObjectiveError: no parameter of the state got a gradient.
        SpentStateError: the graph of this loss was used up, or ``state`` was given away.

    Example:
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
        >>> state = forward_loss(state, torch.ones(4, 2), lambda model, batch: model(batch).mean())
        >>> backward_scaled(state).grads["bias"]
        tensor([1.])
    """
    state.check_alive("backward_scaled")
    graph = state.flight.graph
    if graph is None:
        raise StepOrderError(
            "backward_scaled: this state has no loss to differentiate. Call forward_loss(state, batch, objective) before."
        )
    if type(graph) is PartGraphs:
        tensors, grads = state.tensors, part_gradients(state, graph, keep_graph=keep_graph)
    else:
        tensors, grads = recomputed(
            state, lambda: gradients(state, graph, seed_of(state, graph), keep_graph=keep_graph)
        )
    require_some(grads)
    flight = state.flight.replace(graph=graph if keep_graph else None, grads=Gradients(grads))
    return state.replace(tensors=tensors, flight=flight)
