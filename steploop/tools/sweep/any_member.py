"""Run a member of a grid or of a search, by its number."""

from steploop.errors import ConfigError
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.logs.screens import Screen
from steploop.runs.signals import StopFlag
from steploop.tools.sweep.member_run import run_member
from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["run_any_member"]


def run_any_member(
    sweep: SweepRecord, number: int, file: RecipeFile, *, screen: Screen, stop: StopFlag, trust: bool
) -> int:
    """Run the member of that number; returns its exit code, see ``run_member``.

    Raises:
        ConfigError: there is none of that number.
    """
    if sweep.search == "optuna":
        from steploop.tools.sweep.trials import run_trial

        return run_trial(sweep, number, file, screen=screen, stop=stop, trust=trust)
    members = sweep.members()
    if not 0 <= number < len(members):
        raise ConfigError(
            f"{sweep.path} has {len(members)} members, counted from 0, and none has the number {number}."
        )
    return run_member(sweep, members[number], file, screen=screen, stop=stop, trust=trust)
