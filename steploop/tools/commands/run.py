"""``steploop run`` and ``steploop resume``: train, and print how it ended."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

from steploop.errors import ConfigError
from steploop.recipe.recipe_paths import find_recipe
from steploop.runs.ranks.launcher import rank_here
from steploop.runs.safe_text import safe_text
from steploop.runs.standard_streams import lasting_streams
from steploop.tools.commands.command_class import Command
from steploop.tools.commands.endings import finish
from steploop.tools.commands.run_options import (
    CHECKPOINT,
    COMPILE,
    COMPILE_MODES,
    CSV,
    DEVICE,
    DIRECTORY,
    EPOCHS,
    EXACT,
    INIT,
    INIT_PARTIAL,
    INIT_RENAME,
    LAYERS,
    LIMIT,
    LOG,
    MLFLOW,
    OTHER_RECIPE,
    OUT,
    PARTS,
    QUIET,
    RANK_TIMEOUT,
    RANKS,
    RECIPE,
    RESTART,
    RESUME,
    SEED,
    SET,
    TENSORBOARD,
    TRUST,
    TUNE,
    WANDB,
    CompileMode,
    RanksMode,
)  # fmt: skip

__all__ = ["RunCommand", "resume", "run"]


class RunCommand(Command):
    """A command whose ``--compile`` may stand alone, without taking the next word for its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell a bare ``--compile`` out, then parse."""
        following = [*args, ""][1:]
        spelled = [
            "--compile=on" if word == "--compile" and after not in COMPILE_MODES else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, spelled)


def run(
    recipe: Annotated[str | None, RECIPE] = None,
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    out: Annotated[Path | None, OUT] = None,
    resume_from: Annotated[Path | None, RESUME] = None,
    init: Annotated[Path | None, INIT] = None,
    init_rename: Annotated[list[str] | None, INIT_RENAME] = None,
    init_partial: Annotated[list[str] | None, INIT_PARTIAL] = None,
    device: Annotated[str, DEVICE] = "auto",
    epochs: Annotated[int | None, EPOCHS] = None,
    seed: Annotated[int | None, SEED] = None,
    limit_steps: Annotated[int | None, LIMIT] = None,
    checkpoint_every: Annotated[int | None, CHECKPOINT] = None,
    log_every: Annotated[int | None, LOG] = None,
    quiet: Annotated[bool, QUIET] = False,
    tensorboard: Annotated[bool, TENSORBOARD] = False,
    csv: Annotated[bool, CSV] = False,
    mlflow: Annotated[bool, MLFLOW] = False,
    wandb: Annotated[bool, WANDB] = False,
    layer_norms: Annotated[int | None, LAYERS] = None,
    compile: Annotated[CompileMode | None, COMPILE] = None,  # noqa: A002  (the option's name)
    no_tune: Annotated[bool, TUNE] = False,
    require_exact: Annotated[bool, EXACT] = False,
    restart_epoch: Annotated[bool, RESTART] = False,
    trust: Annotated[bool, TRUST] = False,
    parts: Annotated[int | None, PARTS] = None,
    ranks: Annotated[RanksMode | None, RANKS] = None,
    rank_timeout: Annotated[float | None, RANK_TIMEOUT] = None,
) -> None:
    """Train RECIPE; write a run directory.

    The last line of stdout is one JSON object with the last metrics; in a terminal, a sentence.
    """
    if recipe is None and resume_from is None:
        raise ConfigError(_which_recipe())
    if recipe is not None:
        find_recipe(recipe)  # a mistyped name is said at once, before torch is loaded
    from steploop.recipe.config_values import split_assignments
    from steploop.runs.text_names import readable

    values: dict[str, Any] = dict(split_assignments([readable(text) for text in overrides or []]))
    for name, value in (("epochs", epochs), ("seed", seed)):
        if value is not None:
            if name in values:
                raise ConfigError(f"--{name} and --set {name} are both given. Give one of them.")
            values[name] = value
    options: dict[str, Any] = {
        "device": device, "limit_steps": limit_steps, "checkpoint_every": checkpoint_every, "log_every": log_every,
        "tensorboard": tensorboard, "csv": csv, "mlflow": mlflow, "wandb": wandb, "layer_norms": layer_norms,
        "compile": COMPILE_MODES[compile], "tune": not no_tune, "require_exact": require_exact,
        "restart_epoch": restart_epoch, "parts": parts, "ranks": None if ranks is None else ranks.value,
        "rank_timeout": rank_timeout,
    }  # fmt: skip
    with lasting_streams():
        if not quiet and rank_here() == 0:
            _say_what_takes_long(resume_from or recipe)
        from steploop.runs.from_python import launch
        from steploop.runs.initial_weights import InitialWeights
        from steploop.runs.logs.screens import choose_screen
        from steploop.runs.signals import process_flag

        if init is not None:
            names = split_assignments(init_rename or [], option="--init-rename")
            options["init"] = InitialWeights(path=init, rename=names, partial=tuple(init_partial or ()))
        elif init_rename or init_partial:
            raise ConfigError("--init-rename and --init-partial are about --init. Give --init WEIGHTS too.")
        code = finish(
            launch(
                recipe, values, out=out, resume=resume_from, screen=choose_screen(quiet=quiet), stop=process_flag(),
                trust=trust, **options,
            )
        )  # fmt: skip
    if code:
        raise SystemExit(code)


def _which_recipe() -> str:
    """What to say to a bare ``steploop run``."""
    from steploop.tools.commands.recipes import listed_recipes

    return (
        "Which recipe? Give a file, or the name of a shipped one:\n\n"
        + "\n".join(f"  {line}" for line in listed_recipes(indent=2))
        + "\n\nsteploop run mnist --help lists the options, and the settings of that recipe.\n"
        "steploop new my_recipe begins your own; steploop resume DIR goes on with a run."
    )


def _say_what_takes_long(what: str | Path | None) -> None:
    """Tell the user at once that the command was understood: torch takes seconds to load."""
    if what is not None and "torch" not in sys.modules:
        sys.stdout.write(f"starting {safe_text(what)}: loading torch ...\n")
        sys.stdout.flush()


def resume(
    directory: Annotated[Path, DIRECTORY],
    **options: Any,
) -> None:
    """Go on with a run at the very batch where it stopped.

    This runs the recipe in DIRECTORY.
    """
    run(resume_from=directory, **options)


def _options_of_run() -> dict[str, inspect.Parameter]:
    """The options of ``run`` that ``resume`` takes too."""
    found = dict(inspect.signature(run).parameters)
    for name in ("out", "resume_from", "init", "init_rename", "init_partial"):
        del found[name]
    found["recipe"] = found["recipe"].replace(
        kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[str | None, OTHER_RECIPE]
    )
    return found


def _take_options_of_run() -> None:
    options, own = _options_of_run(), inspect.signature(resume)
    directory = own.parameters["directory"]
    resume.__signature__ = own.replace(parameters=[directory, *options.values()])  # type: ignore[attr-defined]
    annotations = {name: option.annotation for name, option in options.items()}
    resume.__annotations__ = {"directory": directory.annotation, **annotations, "return": None}


_take_options_of_run()  # typer reads both
