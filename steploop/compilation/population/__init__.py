"""A population of train states as one compiled graph: ``stack``, ``vmap``, ``unstack``."""

from steploop.compilation.population.stacked_state import Population as Population
from steploop.compilation.population.stacked_state import stack as stack
from steploop.compilation.population.stacked_state import unstack as unstack
from steploop.compilation.population.vmapped_step import VmappedStep as VmappedStep
from steploop.compilation.population.vmapped_step import vmap as vmap

__all__ = ["Population", "VmappedStep", "stack", "unstack", "vmap"]
