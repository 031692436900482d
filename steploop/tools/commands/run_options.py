"""The options of ``steploop run`` and ``steploop resume``."""

from enum import StrEnum

import typer

from steploop.runs.logger_options import LOGGER_OPTIONS
from steploop.tools.commands.completion import complete_recipe, complete_run, complete_setting

__all__ = [
    "CHECKPOINT", "COMPILE", "COMPILE_MODES", "CSV", "DEVICE", "DIRECTORY", "EPOCHS", "EXACT", "INIT", "INIT_PARTIAL", "INIT_RENAME", "LAYERS", "LIMIT", "LOG", "MLFLOW", "OTHER_RECIPE", "OUT",
    "PARTS", "QUIET", "RANKS", "RANK_TIMEOUT", "RECIPE", "RESTART", "RESUME", "SEED", "SET", "TENSORBOARD", "TRUST", "TUNE", "WANDB", "CompileMode", "RanksMode",
]  # fmt: skip

_RUN, _LOGS, _RESUME, _WEIGHTS = "Run directory", "Logs", "Going on with a run", "First weights"
_RANKS = "Ranks"

RECIPE = typer.Argument(
    help="A recipe file, or the name of a shipped recipe (see steploop recipes).", show_default=False,
    autocompletion=complete_recipe,
)  # fmt: skip
DIRECTORY = typer.Argument(help="The directory of the run.", show_default=False, autocompletion=complete_run)
OTHER_RECIPE = typer.Option(
    "--recipe", help="Go on with another recipe than the copy in DIRECTORY.", show_default=False,
    autocompletion=complete_recipe,
)  # fmt: skip
SET = typer.Option(
    "--set", metavar="NAME=VALUE", autocompletion=complete_setting,
    help="A setting of the recipe; may be given several times. --help after a RECIPE lists its settings.",
)  # fmt: skip
EPOCHS = typer.Option(min=0, metavar="N", help="Short for --set epochs=N.", show_default=False)
SEED = typer.Option(min=0, metavar="N", help="Short for --set seed=N.", show_default=False)
DEVICE = typer.Option(help="auto, cpu, cuda (cuda:1) or mps.")
COMPILE = typer.Option(
    help="Compile the step into one graph; alone: on. auto measures both forms and takes the faster one. "
    "Default: as the recipe says.",
    show_default=False,
)
TUNE = typer.Option("--no-tune", help="Leave the memory allocator's thresholds as they are.")

OUT = typer.Option(
    help="Directory for the run; it must be empty. Default: runs/<recipe>-<n>.", show_default=False,
    rich_help_panel=_RUN,
)  # fmt: skip
LIMIT = typer.Option(
    min=1, metavar="N", help="Stop after N steps, evaluate and end: a quick look.", show_default=False,
    rich_help_panel=_RUN,
)  # fmt: skip
CHECKPOINT = typer.Option(
    min=1, metavar="N", help="Checkpoint every N steps, besides each epoch.", show_default=False,
    rich_help_panel=_RUN,
)  # fmt: skip

INIT = typer.Option(
    metavar="WEIGHTS",
    help="Begin with these weights and nothing else of theirs: a run, a checkpoint, a safetensors file, or a directory with a "
    "model.safetensors.",
    show_default=False, rich_help_panel=_WEIGHTS,
)  # fmt: skip
INIT_RENAME = typer.Option(
    "--init-rename",
    metavar="OLD=NEW",
    help="With --init: a name, or what names begin with before a dot, in the file and here; may be given several times.",
    show_default=False, rich_help_panel=_WEIGHTS,
)  # fmt: skip
INIT_PARTIAL = typer.Option(
    "--init-partial",
    metavar="PATTERN",
    help="With --init: tensors that may be missing, left over or of another shape, such as 'fc.*'; may be given several times.",
    show_default=False, rich_help_panel=_WEIGHTS,
)  # fmt: skip

LOG = typer.Option(
    min=1,
    metavar="N",
    help="Log every N steps; default: ten times an epoch, at least every 50.",
    show_default=False, rich_help_panel=_LOGS,
)  # fmt: skip
QUIET = typer.Option("--quiet", help="Show nothing but the last line.", rich_help_panel=_LOGS)
TENSORBOARD, CSV, MLFLOW, WANDB = (
    typer.Option(f"--{name}", help=text, rich_help_panel=_LOGS) for name, text in LOGGER_OPTIONS.items()
)
LAYERS = typer.Option(
    min=1,
    metavar="N",
    help="Log the gradient norm of each layer group: N parts of a name make a group.",
    show_default=False, rich_help_panel=_LOGS,
)  # fmt: skip

RESUME = typer.Option(
    "--resume", help="Directory of a run to go on with.", show_default=False, rich_help_panel=_RESUME,
    autocompletion=complete_run,
)  # fmt: skip
EXACT = typer.Option(
    "--require-exact",
    help="Refuse to resume where the bits may come out differently.",
    rich_help_panel=_RESUME,
)
RESTART = typer.Option(
    "--restart-epoch",
    help="Begin an epoch anew instead of in its middle: where the data or the batches are others than before, and for streams "
    "that cannot begin in the middle.",
    rich_help_panel=_RESUME,
)
TRUST = typer.Option(
    "--trust",
    help="Run the recipe in a run directory whose files belong to another user.",
    rich_help_panel=_RESUME,
)

PARTS = typer.Option(
    min=1, metavar="P", show_default=False, rich_help_panel=_RANKS,
    help="Cut each batch into P parts, which the ranks that torchrun starts share: their number has to divide P and changes no "
    "bit. Default: one for each rank; a resume keeps it.",
)  # fmt: skip
RANKS = typer.Option(
    show_default=False, rich_help_panel=_RANKS,
    help="fast: sum over ranks in the quickest order, which differs by their number. Default: exact.",
)  # fmt: skip
RANK_TIMEOUT = typer.Option(
    min=1, metavar="SECONDS", show_default=False, rich_help_panel=_RANKS,
    help="How long a rank waits for the others before the run ends. Default: 600.",
)  # fmt: skip

COMPILE_MODES = {"on": True, "off": False, "auto": "auto", None: None}


class CompileMode(StrEnum):
    """What may follow ``--compile``."""

    on = "on"
    off = "off"
    auto = "auto"


class RanksMode(StrEnum):
    """What may follow ``--ranks``."""

    exact = "exact"
    fast = "fast"
