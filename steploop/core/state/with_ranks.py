"""Let ranks train a state that was made without them, as a run does with the state of its recipe."""

import copy

from steploop.core.ranks import Ranks
from steploop.core.state.same_start import check_same, refuse_wrapped, take_from_first_rank
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
    machine, tensors = copy.copy(state.machine), state.tensors
    refuse_wrapped(machine.model)
    values = {**tensors.params, **tensors.buffers}
    made = {
        "seed": state.seed, "precision": state.precision, "scale": repr(state.scale), "groups": machine.group_names,
        "optimizer": machine.optimizer_name, "values": {n: (tuple(t.shape), str(t.dtype)) for n, t in values.items()},
    }  # fmt: skip
    check_same(ranks, "The recipe makes another state", made)
    take_from_first_rank(ranks, [*values.values(), *(tensors.ema or {}).values()])
    machine.ranks = ranks
    return state.replace(machine=machine)


def without_ranks(state: TrainState) -> TrainState:
    """The same value as a state of this process alone, for what one rank does without the others: it shares the tensors."""
    if state.ranks is None:
        return state
    machine = copy.copy(state.machine)
    machine.ranks = None
    return state.replace(machine=machine)
