"""Let ranks train a state that was made without them, as a run does with the state of its recipe."""

import copy

from steploop.core.ranks import Ranks
from steploop.core.state.same_start import refuse_wrapped, start_together
from steploop.core.state.sharded_module import settle_sharded
from steploop.core.state.train_state import TrainState

__all__ = ["with_ranks", "without_ranks"]


def with_ranks(state: TrainState, ranks: Ranks) -> TrainState:
    """Make the state that ``TrainState.create(..., ranks=ranks)`` would have made.

    It takes over the tensors, the model and the optimizer of ``state``, which is not to be used after that. All ranks begin
    with the values of rank 0.

    Args:
        state: made without ranks; between two steps.
        ranks: who trains it.

    Raises:
        ConfigError: the ranks have made different states.
    """
    machine = copy.copy(state.machine)
    refuse_wrapped(machine.model)
    start_together(
        ranks, "The recipe makes another state", machine, state.tensors,
        seed=state.seed, precision=state.precision, scale=repr(state.scale), hyper=repr(state.hyper),
    )  # fmt: skip
    machine.ranks = ranks
    settle_sharded(machine)
    return state.replace(machine=machine)


def without_ranks(state: TrainState) -> TrainState:
    """The same value as a state of this process alone, for what one rank does without the others: it shares the tensors."""
    if state.ranks is None:
        return state
    machine = copy.copy(state.machine)
    machine.ranks = None
    return state.replace(machine=machine)
