"""The options of ``steploop run`` and ``steploop resume``."""

from enum import StrEnum

import typer

__all__ = [
    "CHECKPOINT", "COMPILE", "COMPILE_MODES", "CSV", "DEVICE", "EPOCHS", "EXACT", "INIT", "INIT_PARTIAL", "INIT_RENAME", "LAYERS", "LIMIT", "LOG", "MLFLOW", "OUT",
    "QUIET", "RECIPE", "RESTART", "RESUME", "SEED", "SET", "TENSORBOARD", "TRUST", "TUNE", "WANDB", "CompileMode",
]  # fmt: skip

RECIPE = typer.Argument(
    help="A recipe file, or the name of a shipped recipe (see steploop recipes).", show_default=False
)
SET = typer.Option(
    "--set", metavar="NAME=VALUE", help="A field of the recipe's Config; may be given several times."
)
OUT = typer.Option(
    help="Directory for the run; it must be empty. Default: runs/<recipe>-<n>.", show_default=False
)
INIT = typer.Option(
    metavar="WEIGHTS",
    help="Begin with these weights and nothing else of theirs: a run, a checkpoint, a safetensors file, or a directory with a "
    "model.safetensors.",
    show_default=False,
)
INIT_RENAME = typer.Option(
    "--init-rename",
    metavar="OLD=NEW",
    help="With --init: a name, or what names begin with before a dot, in the file and here; may be given several times.",
    show_default=False,
)
INIT_PARTIAL = typer.Option(
    "--init-partial",
    metavar="PATTERN",
    help="With --init: tensors that may be missing, left over or of another shape, such as 'fc.*'; may be given several times.",
    show_default=False,
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
RESTART = typer.Option(
    "--restart-epoch",
    help="Begin an epoch anew instead of in its middle: where the data or the batches are others than before, and for streams "
    "that cannot begin in the middle.",
)
EXACT = typer.Option("--require-exact", help="Refuse to resume where the bits may come out differently.")

COMPILE_MODES = {"on": True, "off": False, "auto": "auto", None: None}


class CompileMode(StrEnum):
    """What may follow ``--compile``."""

    on = "on"
    off = "off"
    auto = "auto"
