"""steploop: a training epoch is ``functools.reduce(train_step, batches, state)``."""

from typing import TYPE_CHECKING

from steploop.core.lazy import lazy_names
from steploop.core.moved_names import install as find_moved_names

if TYPE_CHECKING:
    from steploop.compilation import compile as compile  # noqa: A004  (steploop.compile, as in torch.compile)
    from steploop.compilation.population import Population as Population
    from steploop.compilation.population import stack as stack
    from steploop.compilation.population import unstack as unstack
    from steploop.compilation.population import vmap as vmap
    from steploop.core.batch_parts import Parts as Parts
    from steploop.core.batch_parts import split_parts as split_parts
    from steploop.core.early_stopping import EarlyStopping as EarlyStopping
    from steploop.core.optimizer import Optimizer as Optimizer
    from steploop.core.plateau import ReduceLROnPlateau as ReduceLROnPlateau
    from steploop.core.precision import LossScale as LossScale
    from steploop.core.precision import best_precision as best_precision
    from steploop.core.ranks import Ranks as Ranks
    from steploop.core.schedules import Rates as Rates
    from steploop.core.schedules import constant as constant
    from steploop.core.schedules import cosine_annealing as cosine_annealing
    from steploop.core.schedules import from_torch as from_torch
    from steploop.core.schedules import one_cycle as one_cycle
    from steploop.core.schedules import step_lr as step_lr
    from steploop.core.schedules import warmup_cosine as warmup_cosine
    from steploop.core.schedules import warmup_stable_decay as warmup_stable_decay
    from steploop.core.seeds import fold_in as fold_in
    from steploop.core.state.train_state import TrainState as TrainState
    from steploop.core.steps.accumulation import accumulate as accumulate
    from steploop.core.steps.averaging import update_ema as update_ema
    from steploop.core.steps.backward import backward_scaled as backward_scaled
    from steploop.core.steps.clip import unscale_and_clip as unscale_and_clip
    from steploop.core.steps.evaluation import evaluate as evaluate
    from steploop.core.steps.forward import forward_loss as forward_loss
    from steploop.core.steps.metrics import accuracy as accuracy
    from steploop.core.steps.set_rates import schedule as schedule
    from steploop.core.steps.update import optimizer_step as optimizer_step
    from steploop.errors import ConfigError as ConfigError
    from steploop.errors import DataError as DataError
    from steploop.errors import EmptyDataError as EmptyDataError
    from steploop.errors import ObjectiveError as ObjectiveError
    from steploop.errors import SteploopError as SteploopError
    from steploop.runs.from_python import run as run
    from steploop.runs.reading import read_run as read_run
    from steploop.tools.sweep.sweeping import sweep as sweep

__version__ = "0.1.0"

# Public name -> the module it is defined in.
_HOMES = {
    "compile": "compilation",
    "Population": "compilation.population",
    "stack": "compilation.population",
    "unstack": "compilation.population",
    "vmap": "compilation.population",
    "EarlyStopping": "core.early_stopping",
    "Optimizer": "core.optimizer",
    "ReduceLROnPlateau": "core.plateau",
    "LossScale": "core.precision",
    "best_precision": "core.precision",
    "Parts": "core.batch_parts",
    "Ranks": "core.ranks",
    "split_parts": "core.batch_parts",
    "Rates": "core.schedules",
    "constant": "core.schedules",
    "cosine_annealing": "core.schedules",
    "from_torch": "core.schedules",
    "one_cycle": "core.schedules",
    "step_lr": "core.schedules",
    "warmup_cosine": "core.schedules",
    "warmup_stable_decay": "core.schedules",
    "fold_in": "core.seeds",
    "TrainState": "core.state.train_state",
    "accumulate": "core.steps.accumulation",
    "update_ema": "core.steps.averaging",
    "backward_scaled": "core.steps.backward",
    "unscale_and_clip": "core.steps.clip",
    "accuracy": "core.steps.metrics",
    "evaluate": "core.steps.evaluation",
    "forward_loss": "core.steps.forward",
    "schedule": "core.steps.set_rates",
    "optimizer_step": "core.steps.update",
    "ConfigError": "errors",
    "DataError": "errors",
    "EmptyDataError": "errors",
    "ObjectiveError": "errors",
    "SteploopError": "errors",
    "run": "runs.from_python",
    "read_run": "runs.reading",
    "sweep": "tools.sweep.sweeping",
}
# `from steploop import *` must not hide the built-in compile: write steploop.compile.
__all__ = [*(name for name in _HOMES if name != "compile"), "__version__"]  # noqa: PLE0604  (they are strings)

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
find_moved_names()
