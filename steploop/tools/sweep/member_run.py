"""Begin one member of a sweep or go on with it, in this process; its failure is noted, not raised."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import attrs

from steploop.core.interruption import Interrupted
from steploop.errors import CheckpointIncompatibleError, RunExistsError, RunLockedError, SteploopError
from steploop.recipe.imported_modules import imported_modules
from steploop.recipe.recipe import Logger
from steploop.recipe.recipe_files import RecipeFile, load_recipe_file
from steploop.runs.contract import changed_code
from steploop.runs.from_python import launch
from steploop.runs.logs.screens import Screen
from steploop.runs.safe_text import safe_lines
from steploop.runs.signals import StopFlag, exit_code_of, interruption_of
from steploop.runs.standing import is_run, read_standing
from steploop.tools.sweep.member_ends import read_end
from steploop.tools.sweep.sweep_record import Member, SweepRecord
from steploop.tools.sweep.sweep_writing import clear_end, write_end

__all__ = ["TAKEN", "is_settled", "recorded_recipe", "refuse_changed_code", "run_member"]

TAKEN = RunLockedError.exit_code  # another process has this member


def is_settled(sweep: SweepRecord, number: int) -> bool:
    """Whether nothing is left to do for a member: it is finished or pruned."""
    where = sweep.directory(number)
    if is_run(where) and read_standing(where).state == "finished":
        return True
    end = read_end(sweep, number)
    return end is not None and end.state == "pruned"


def recorded_recipe(sweep: SweepRecord) -> RecipeFile:
    """The recipe that a sweep was begun with: the copy in its directory, and the modules beside the original.

    Raises:
        ConfigError: the copy cannot be loaded.
        CheckpointIncompatibleError: the copy or one of the modules is not what it was.
    """
    origin, copy = Path(sweep.recipe["path"]), sweep.path / "recipe.py"
    # a start that was killed may have left no copy
    file = load_recipe_file(copy if copy.exists() else origin, beside=origin.parent)
    file = attrs.evolve(file, path=origin, name=sweep.recipe["name"])
    refuse_changed_code(sweep, file)
    return file


def refuse_changed_code(sweep: SweepRecord, file: RecipeFile) -> None:
    """Refuse to run members with other code than those before them.

    Raises:
        CheckpointIncompatibleError: names what changed.
    """
    modules = imported_modules(file.source, file.path.resolve().parent)
    if changes := changed_code(sweep.recipe, name=file.path.name, sha256=file.sha256, modules=modules):
        raise CheckpointIncompatibleError(
            f"The sweep in {sweep.path} was begun with other code. Changed: {', '.join(map(str, changes))}. Put it back as it "
            "was, or begin another sweep: members with different code cannot be compared."
        )


def run_member(
    sweep: SweepRecord,
    member: Member,
    file: RecipeFile,
    *,
    screen: Screen,
    stop: StopFlag,
    trust: bool = False,
    loggers: Sequence[Logger] = (),
    vectorised: bool = False,
) -> int:
    """Train a member to its end, from wherever it stands.

    Args:
        sweep: what it belongs to.
        member: which one.
        file: the recipe, see ``recorded_recipe``.
        screen: where its progress is shown.
        stop: ends it after the step in hand.
        trust: go on with a run whose files belong to another user.
        loggers: in addition to those of the recipe.
        vectorised: whether a population takes its steps.

    Returns:
        The exit code that ``steploop run`` would end with; 6 if another process has the member.
    """
    where = sweep.directory(member.number)
    if is_settled(sweep, member.number):
        return 0
    options = {key: value for key, value in sweep.options.items() if value is not None}
    options["vectorised"] = vectorised
    options["command"] = ("steploop", "sweep", "--resume", str(sweep.path))
    try:
        clear_end(sweep, member.number)
        if is_run(where):
            options.pop("device", None)  # a resume takes the one that was recorded
            summary = launch(
                file,
                {},
                out=None,
                resume=where,
                screen=screen,
                stop=stop,
                loggers=loggers,
                trust=trust,
                **options,
            )
        else:
            values = {**sweep.base, **member.settings}
            summary = launch(
                file, values, out=where, resume=None, screen=screen, stop=stop, loggers=loggers, **options
            )
    except (RunLockedError, RunExistsError) as error:
        sys.stderr.write(f"steploop: {safe_lines(error)}\n")
        return TAKEN
    except (Interrupted, Exception) as error:  # noqa: BLE001  (a recipe may raise anything, and the other members go on)
        if (interrupted := interruption_of(error)) is not None:
            return exit_code_of(interrupted.signum)
        if isinstance(error, SteploopError):
            sys.stderr.write(f"steploop: {safe_lines(error)}\n")
        else:
            traceback.print_exc()
        if not is_run(where):  # else its status.json says it
            write_end(sweep, member, "failed", f"{type(error).__name__}: {error}")
        return error.exit_code if isinstance(error, SteploopError) else 1
    return summary.exit_code
