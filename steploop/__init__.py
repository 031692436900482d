"""steploop: a training epoch is ``functools.reduce(train_step, batches, state)``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steploop.averaging import update_ema as update_ema
    from steploop.compilation import compile as compile  # noqa: A004  (steploop.compile, as in torch.compile)
    from steploop.early_stopping import EarlyStopping as EarlyStopping
    from steploop.errors import SteploopError as SteploopError
    from steploop.evaluation import accuracy as accuracy
    from steploop.evaluation import evaluate as evaluate
    from steploop.folding import accumulate as accumulate
    from steploop.optim import Optimizer as Optimizer
    from steploop.plateau import ReduceLROnPlateau as ReduceLROnPlateau
    from steploop.precision import LossScale as LossScale
    from steploop.schedules import Rates as Rates
    from steploop.schedules import constant as constant
    from steploop.schedules import cosine_annealing as cosine_annealing
    from steploop.schedules import from_torch as from_torch
    from steploop.schedules import one_cycle as one_cycle
    from steploop.schedules import step_lr as step_lr
    from steploop.schedules import warmup_cosine as warmup_cosine
    from steploop.schedules import warmup_stable_decay as warmup_stable_decay
    from steploop.scheduling import schedule as schedule
    from steploop.state import TrainState as TrainState
    from steploop.steps import backward_scaled as backward_scaled
    from steploop.steps import forward_loss as forward_loss
    from steploop.steps import unscale_and_clip as unscale_and_clip
    from steploop.updating import optimizer_step as optimizer_step

__version__ = "0.1.0"

# Public name -> the module it lives in. A name is imported when it is first used: ``steploop --version`` and the
# refusal of a mistyped option need not wait two seconds for torch.
_HOMES = {
    "update_ema": "averaging",
    "EarlyStopping": "early_stopping",
    "SteploopError": "errors",
    "accuracy": "evaluation",
    "evaluate": "evaluation",
    "accumulate": "folding",
    "compile": "compilation",
    "Optimizer": "optim",
    "ReduceLROnPlateau": "plateau",
    "LossScale": "precision",
    "Rates": "schedules",
    "constant": "schedules",
    "cosine_annealing": "schedules",
    "from_torch": "schedules",
    "one_cycle": "schedules",
    "step_lr": "schedules",
    "warmup_cosine": "schedules",
    "warmup_stable_decay": "schedules",
    "schedule": "scheduling",
    "TrainState": "state",
    "backward_scaled": "steps",
    "forward_loss": "steps",
    "optimizer_step": "updating",
    "unscale_and_clip": "steps",
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604  (they are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
