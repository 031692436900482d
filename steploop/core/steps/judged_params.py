"""The parameters that a state is judged by: those of a schedule-free optimizer are others than those it trains."""

from collections.abc import Mapping

from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.core.trees import map_tensors

__all__ = ["params_to_evaluate"]


def params_to_evaluate(state: TrainState) -> Mapping[str, Tensor]:
    """Parameter name -> the value to evaluate, average or export; of most optimizers that which is trained.

    An optimizer with the modes ``eval`` and ``train`` (schedule-free) computes them from what it trains: that is done on
    copies.
    """
    machine, tensors = state.machine, state.tensors
    if not machine.has_modes:
        return tensors.params
    params = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in tensors.params.items()}
    copies = tensors.replace(params=params, slots=map_tensors(Tensor.clone, tensors.slots))
    with machine.lent(copies, state.hyper):
        machine.set_mode("eval")
    return params
