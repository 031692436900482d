"""A recipe as one of several ranks: ours with its parts of every batch, others' with the batch of this rank alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch.nn.parallel import DistributedDataParallel

from steploop.core.batch_parts import split_parts
from steploop.core.ranks import Ranks
from steploop.core.state.several import members
from steploop.core.state.train_state import TrainState
from steploop.core.state.with_ranks import with_ranks
from steploop.core.steps.objectives import Objective
from steploop.recipe.recipe import Recipe
from steploop.tools.bench.handwritten import Step, handwritten_step

__all__ = ["ddp_step", "on_ranks"]


def on_ranks(
    recipe: Recipe, batches: Sequence[Any], ranks: Ranks, *, whole_parts: bool
) -> tuple[Recipe, list[Any]]:
    """The recipe and its batches as this rank sees them.

    Args:
        recipe: built on every rank.
        batches: of all ranks together.
        ranks: one part for each.
        whole_parts: whether the step is ours, which takes `Parts`; a step of another library takes this rank's part.
    """
    cut = [split_parts(batch, ranks) for batch in batches]
    if not whole_parts:
        return recipe, [parts.batches[0] for parts in cut]
    states = {name: with_ranks(one, ranks) for name, one in members(recipe.state).items()}
    return attrs.evolve(recipe, state=states if isinstance(recipe.state, Mapping) else states[""]), list(cut)


def ddp_step(state: TrainState, objective: Objective) -> Step:
    """Make the usual step with the model in ``DistributedDataParallel``."""
    state.machine.module.set_training(training=True)
    devices = [state.device] if state.device.type == "cuda" else None
    model = DistributedDataParallel(state.model, device_ids=devices)
    return handwritten_step(state, objective, model)
