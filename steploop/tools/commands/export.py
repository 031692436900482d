"""``steploop export``: the weights of a run as one file that a plain module takes."""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.errors import CheckpointDamagedError, ConfigError, DataError
from steploop.tools.commands.completion import complete_run
from steploop.tools.commands.inspect import newest_checkpoint

if TYPE_CHECKING:
    from steploop.checkpoint import Checkpoint

__all__ = ["export"]

RUN = typer.Argument(
    help="A run: its newest checkpoint; or a checkpoint.",
    show_default=False,
    metavar="RUN",
    autocompletion=complete_run,
)
FILE = typer.Argument(help="The safetensors file to write.", show_default=False, metavar="FILE")
RAW = typer.Option("--raw", help="The weights that are trained.")
AVERAGE = typer.Option("--average", help="The averaged weights.")
BEST = typer.Option("--best", help="The run's best checkpoint instead of its newest.")
STATE = typer.Option(
    "--state", metavar="NAME", help="Of several states, write one, without its name.", show_default=False
)
PARTIAL = typer.Option(
    "--partial", help="Write what there is where frozen weights were left out of the checkpoint."
)
OVERWRITE = typer.Option("--overwrite", help="Replace FILE if it exists.")
JSON = typer.Option("--json", help="Print one JSON object.")


def export(
    run: Annotated[Path, RUN],
    file: Annotated[Path, FILE],
    *,
    raw: Annotated[bool, RAW] = False,
    average: Annotated[bool, AVERAGE] = False,
    best: Annotated[bool, BEST] = False,
    state: Annotated[str | None, STATE] = None,
    partial: Annotated[bool, PARTIAL] = False,
    overwrite: Annotated[bool, OVERWRITE] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Write the weights that RUN evaluated to FILE.

    model.load_state_dict(safetensors.torch.load_file(FILE)) takes them. Where an average was evaluated, the average is written. A tied parameter stands under each of its names.
    """
    from steploop.checkpoint import open_checkpoint
    from steploop.checkpoint.weight_export import export_weights
    from steploop.runs.safe_text import safe_text

    if raw and average:
        raise ConfigError(
            "--raw and --average are both given. Give one of them, or none for what was evaluated."
        )
    checkpoint = open_checkpoint(newest_checkpoint(run))
    if best:
        checkpoint = _best(checkpoint)
    averaged = average or (not raw and _averages_were_evaluated(checkpoint))
    count = export_weights(
        checkpoint, file, average=averaged, state=state, partial=partial, overwrite=overwrite
    )
    weights = "average" if averaged else "raw"
    if as_json:
        about = {
            "file": str(file),
            "tensors": count,
            "checkpoint": str(checkpoint.directory),
            "weights": weights,
        }
        sys.stdout.write(json.dumps(about) + "\n")
        return
    said = f"{file}: {count} tensors, the {weights} weights of {checkpoint.directory}"
    sys.stdout.write(f"{safe_text(said)}\n")


def _states(checkpoint: "Checkpoint") -> list[Mapping[str, Any]]:
    try:
        found = list(checkpoint.manifest.state["states"].values())
    except (KeyError, TypeError, AttributeError):
        found = []
    if not found or not all(isinstance(values, Mapping) for values in found):
        raise CheckpointDamagedError(f"{checkpoint.directory} holds no state that steploop writes.")
    return found


def _best(newest: "Checkpoint") -> "Checkpoint":
    """The checkpoint of the best evaluation, by what the newest one knows."""
    from steploop.checkpoint import open_checkpoint

    bests = [values.get("best") for values in _states(newest)]
    step = next((best.get("step") for best in bests if isinstance(best, Mapping)), None)
    place = newest.directory.parent / f"step-{step:012d}" if isinstance(step, int) else None
    if place is None or not place.is_dir():
        raise ConfigError(
            f"{newest.directory.parent} holds no best checkpoint. Leave --best out for the newest."
        )
    return open_checkpoint(place)


def _averages_were_evaluated(checkpoint: "Checkpoint") -> bool:
    """Whether the run evaluated averages, as its record says; a state without averages has no choice.

    Raises:
        ConfigError: there are averages, and no record says which weights were evaluated.
    """
    if all(values.get("ema") is None for values in _states(checkpoint)):
        return False
    from steploop.runs.directory_reader import read_record

    folder = checkpoint.directory.parent
    digits = folder.name.removeprefix("checkpoints-phase-")
    phase = int(digits) - 1 if digits.isdecimal() else 0
    evaluated = None
    with suppress(DataError, KeyError, IndexError, TypeError):  # a checkpoint by itself, or of version 0.1.0
        evaluated = (read_record(folder.parent, "config.json") or {})["phases"][phase]["evaluated"]
    if evaluated not in {"raw", "average"}:
        raise ConfigError(
            f"{checkpoint.directory} holds raw and averaged weights, and the run does not say which of them were evaluated. "
            "Say --raw or --average."
        )
    return bool(evaluated == "average")
