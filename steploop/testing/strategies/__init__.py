"""Hypothesis strategies for everything that goes into a training loop.

    networks    tasks, models, batches, runs, states      small networks with BatchNorm, dropout, tied weights, frozen,
                                                          unused and 0-dim parameters; their data; first states
    optimizers  optimizers, dense_optimizers              every dense optimizer of torch.optim, with its options
    numbers     gradient_trees, bounds, loss_scales,      zero, tiny, huge, inf and nan gradients; legal and power-of-two
                powers_of_two, partitions, cuts, shapes   scales; ways to split a batch and a run
    curves      schedules, histories, early_stoppings,    any legal schedule; metrics with nan and inf
                plateaus

What they draw prints itself so that it can be made again: a network is a ``Task`` of plain numbers and a seed, and
its tensors are functions of that seed.
"""

from steploop.testing.strategies.curves import early_stoppings, histories, plateaus, schedules
from steploop.testing.strategies.networks import (
    Batch,
    Network,
    Task,
    batches,
    classification,
    models,
    runs,
    states,
    tasks,
)
from steploop.testing.strategies.numbers import (
    bounds,
    cuts,
    gradient_trees,
    loss_scales,
    partitions,
    powers_of_two,
    shapes,
)
from steploop.testing.strategies.optimizers import OPTIMIZERS, dense_optimizers, optimizers

__all__ = [
    "OPTIMIZERS",
    "Batch",
    "Network",
    "Task",
    "batches",
    "bounds",
    "classification",
    "cuts",
    "dense_optimizers",
    "early_stoppings",
    "gradient_trees",
    "histories",
    "loss_scales",
    "models",
    "optimizers",
    "partitions",
    "plateaus",
    "powers_of_two",
    "runs",
    "schedules",
    "shapes",
    "states",
    "tasks",
]
