"""Let ranks train a state that was made without them, as a run does with the state of its recipe."""

import copy

from steploop.core.ranks import Ranks
from steploop.core.state.train_state import TrainState

__all__ = ["with_ranks"]


def with_ranks(state: TrainState, ranks: Ranks) -> TrainState:
    """Make the state that ``TrainState.create(..., ranks=ranks)`` would have made.

    It takes over the tensors, the model and the optimizer of ``state``, which is not to be used after that.

    Args:
        state: made without ranks; between two steps.
        ranks: who trains it.
    """
    machine = copy.copy(state.machine)
    machine.ranks = ranks
    return state.replace(machine=machine)
