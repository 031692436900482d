"""``steploop inspect``: verify a checkpoint, and show what is in it."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.errors import CheckpointDamagedError, ConfigError
from steploop.tools.commands.completion import complete_run

if TYPE_CHECKING:
    from steploop.checkpoint import Checkpoint

__all__ = ["inspect", "newest_checkpoint"]

_FOLDS = {"scale": "loss scale", "early_stopping": "early stopping", "plateau": "plateau", "best": "best"}


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint, or a run: its newest one.", show_default=False, autocompletion=complete_run
        ),
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Verify CHECKPOINT and show what is in it.

    Shows counters, optimizer, metrics and every tensor of the model.
    """
    from steploop.checkpoint import open_checkpoint

    opened = open_checkpoint(newest_checkpoint(checkpoint))
    if as_json:
        sys.stdout.write(json.dumps(_as_json(opened)) + "\n")
        return
    from steploop.runs.safe_text import safe_text

    try:
        lines = list(_describe(opened))
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # whole, and yet nothing of steploop's
        raise CheckpointDamagedError(
            f"{opened.directory}: every digest is right, but the state is not one that steploop writes "
            f"({type(error).__name__}: {error}). Use another checkpoint."
        ) from error
    sys.stdout.write("".join(f"{safe_text(line)}\n" for line in lines))


def newest_checkpoint(path: Path) -> Path:
    """Find the checkpoint itself, or the newest one of a run or of a directory of checkpoints."""
    if not path.is_dir():
        raise ConfigError(
            f"There is no directory {path}. Name a checkpoint, such as runs/cifar_amp-1/checkpoints/step-000000000390."
        )
    from steploop.runs.directory_reader import checkpoint_folders, step_folders

    if os.path.lexists(path / "state.json"):
        return path
    found = checkpoint_folders(path) or step_folders(path)
    if not found:
        linked = (
            " Its checkpoints/ is a link, which is not followed."
            if (path / "checkpoints").is_symlink()
            else ""
        )
        raise ConfigError(
            f"{path} is no checkpoint and holds none.{linked} Name a directory that holds a state.json."
        )
    return found[-1]


def _as_json(opened: "Checkpoint") -> dict[str, Any]:
    manifest = opened.manifest
    return {
        "checkpoint": str(opened.directory),
        "digest": opened.digest,
        "environment": dict(opened.environment),
        "files": manifest.records(),
        "tensors": {
            file: {name: spec.to_json() for name, spec in table.items()}
            for file, table in manifest.tensors.items()
        },
        "state": manifest.state,
    }


def _describe(opened: "Checkpoint") -> Iterator[str]:
    written = opened.environment
    yield f"{opened.directory}: whole"
    yield f"digest       {opened.digest}"
    yield f"written      {written['created']} by process {written['pid']} on {written['host']}"
    yield f"versions     steploop {written['steploop']}, torch {written['torch']}, python {written['python']}"
    for name, values in opened.manifest.state["states"].items():
        yield from _describe_state(name, values)
    for file, size, count in opened.manifest.listing():
        yield f"{file}: {size:,} bytes, {count} tensors"
    model = opened.manifest.tensors["model.safetensors"]
    width = max((len(name) for name in model), default=0)
    for name, spec in model.items():
        yield f"  {name:<{width}}  {spec}"


def _describe_state(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    if name:
        yield f"[{name}]"
    skipped = values["attempted_steps"] - values["applied_steps"]
    yield f"step         {values['applied_steps']} ({skipped} skipped), epoch {values['epoch'] + (values['batch'] > 0)}, batch {values['batch']}"
    yield f"seed         {values['seed']}, precision {values['precision']}"
    yield f"optimizer    {values['optimizer']}"
    for number, group in enumerate(values["hyper"]):
        label = f"group {number}" if len(values["hyper"]) > 1 else ""
        yield f"{label:<12} " + ", ".join(f"{k}={_shown(v)}" for k, v in group["dict"] if v)
    for key, label in _FOLDS.items():
        if values[key] is not None:
            yield f"{label:<12} " + ", ".join(f"{k}={_shown(v)}" for k, v in values[key].items())


def _shown(value: Any) -> str:
    """Format a value without the marks for what JSON lacks."""
    if not isinstance(value, Mapping):
        return str(value)
    ((mark, inside),) = value.items()
    if mark == "tuple":
        return f"({', '.join(_shown(one) for one in inside)})"
    return "a tensor" if mark == "tensor" else str(inside)
