"""``steploop run`` and ``steploop resume``: options to a request, and the run's summary as the last line of stdout."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from steploop.errors import ConfigError
from steploop.runs.safe_text import safe_text
from steploop.runs.standard_streams import lasting_streams
from steploop.tools.commands.endings import finish

__all__ = ["RunCommand", "resume", "run"]

RECIPE = typer.Argument(
    help="A recipe file, or the name of a shipped recipe (see steploop recipes).", show_default=False
)
SET = typer.Option(
    "--set", metavar="NAME=VALUE", help="A field of the recipe's Config; may be given several times."
)
OUT = typer.Option(
    help="Directory for the run; it must be empty. Default: runs/<recipe>-<n>.", show_default=False
)
RESUME = typer.Option("--resume", help="Directory of a run to go on with.", show_default=False)
DEVICE = typer.Option(help="auto, cpu, cuda (cuda:1) or mps.")
EPOCHS = typer.Option(min=0, help="Short for --set epochs=N.", show_default=False)
SEED = typer.Option(min=0, help="Short for --set seed=N.", show_default=False)
LIMIT = typer.Option(
    min=1, metavar="N", help="Stop after N steps, evaluate and end: a quick look.", show_default=False
)
QUIET = typer.Option("--quiet", help="Show nothing but the last line.")
TENSORBOARD = typer.Option("--tensorboard", help="Write TensorBoard event files into the run directory.")
CSV = typer.Option("--csv", help="Write metrics.csv into the run directory.")
MLFLOW = typer.Option(
    "--mlflow", help="Log to MLflow: to $MLFLOW_TRACKING_URI, or to mlflow.db beside the run directory."
)
WANDB = typer.Option("--wandb", help="Log to Weights & Biases; offline where WANDB_MODE=offline.")
LAYERS = typer.Option(
    min=1,
    metavar="N",
    help="Log the gradient norm of each layer group: N parts of a name make a group.",
    show_default=False,
)
COMPILE = typer.Option(
    help="Compile the step into one graph; alone: on. auto measures both forms and takes the faster one. "
    "Default: as the recipe says.",
    show_default=False,
)
TUNE = typer.Option("--no-tune", help="Leave the memory allocator's thresholds as they are.")
CHECKPOINT = typer.Option(
    min=1, metavar="N", help="Checkpoint every N steps, besides each epoch.", show_default=False
)
LOG = typer.Option(
    min=1,
    metavar="N",
    help="Log every N steps; default: ten times an epoch, at least every 50.",
    show_default=False,
)
TRUST = typer.Option("--trust", help="Run the recipe in a run directory whose files belong to another user.")
EXACT = typer.Option("--require-exact", help="Refuse to resume where the bits may come out differently.")

_COMPILE = {"on": True, "off": False, "auto": "auto", None: None}


class CompileMode(StrEnum):
    """What may follow ``--compile``."""

    on = "on"
    off = "off"
    auto = "auto"


class RunCommand(TyperCommand):
    """A command whose ``--compile`` may stand alone, without taking the next word for its value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell a bare ``--compile`` out, then parse."""
        following = [*args[1:], ""]
        spelled = [
            "--compile=on" if word == "--compile" and after not in _COMPILE else word
            for word, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, spelled)


def run(
    recipe: Annotated[str | None, RECIPE] = None,
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    out: Annotated[Path | None, OUT] = None,
    resume_from: Annotated[Path | None, RESUME] = None,
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
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Train RECIPE; what it did goes to a run directory, its last metrics to stdout as one JSON line."""
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
        "compile": _COMPILE[compile], "tune": not no_tune, "require_exact": require_exact,
    }  # fmt: skip
    with lasting_streams():
        if not quiet:
            _say_what_takes_long(resume_from or recipe)
        from steploop.runs.from_python import launch
        from steploop.runs.logs.screens import choose_screen
        from steploop.runs.signals import process_flag

        code = finish(
            launch(
                recipe, values, out=out, resume=resume_from, screen=choose_screen(quiet=quiet), stop=process_flag(),
                trust=trust, **options,
            )
        )  # fmt: skip
    if code:
        raise SystemExit(code)


def _say_what_takes_long(what: str | Path | None) -> None:
    """Tell the user at once that the command was understood: torch takes seconds to load."""
    if what is not None and "torch" not in sys.modules:
        sys.stdout.write(f"starting {safe_text(what)}: loading torch ...\n")
        sys.stdout.flush()


def resume(
    directory: Annotated[Path, typer.Argument(help="The directory of the run.", show_default=False)],
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    device: Annotated[str, DEVICE] = "auto",
    epochs: Annotated[int | None, EPOCHS] = None,
    limit_steps: Annotated[int | None, LIMIT] = None,
    quiet: Annotated[bool, QUIET] = False,
    require_exact: Annotated[bool, EXACT] = False,
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Go on with the run in DIRECTORY, at the very batch where it stopped. This runs the recipe in DIRECTORY."""
    run(
        overrides=overrides, resume_from=directory, device=device, epochs=epochs, limit_steps=limit_steps,
        quiet=quiet, require_exact=require_exact, trust=trust,
    )  # fmt: skip
