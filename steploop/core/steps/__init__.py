"""The step functions, one file each, and the passes and arithmetic they share."""

from typing import TYPE_CHECKING

from steploop.core.lazy import lazy_names

if TYPE_CHECKING:
    from steploop.core.steps.accumulation import accumulate as accumulate
    from steploop.core.steps.averaging import update_ema as update_ema
    from steploop.core.steps.backward import backward_scaled as backward_scaled
    from steploop.core.steps.clip import unscale_and_clip as unscale_and_clip
    from steploop.core.steps.evaluation import evaluate as evaluate
    from steploop.core.steps.forward import forward_loss as forward_loss
    from steploop.core.steps.set_rates import schedule as schedule
    from steploop.core.steps.update import optimizer_step as optimizer_step

# Public name -> the module it is defined in.
_HOMES = {
    "accumulate": "accumulation",
    "update_ema": "averaging",
    "backward_scaled": "backward",
    "unscale_and_clip": "clip",
    "evaluate": "evaluation",
    "forward_loss": "forward",
    "schedule": "set_rates",
    "optimizer_step": "update",
}
__all__ = [*_HOMES]  # noqa: PLE0604  (they are strings)

__getattr__, __dir__ = lazy_names(__name__, _HOMES, globals())
