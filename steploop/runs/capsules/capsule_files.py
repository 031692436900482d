"""What a capsule is on the disk: written whole, read back with its batch.

A capsule is a directory in ``capsules/`` of the run::

    step-000000000017/
        state/              the state before the step, as a checkpoint
        batch.safetensors   the tensors of the batch
        capsule.json        where it happened, what was seen, the batch's structure
        recipe.py, config.json   copies of the run's
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steploop import checkpoint
from steploop.checkpoint.format.batch_files import decode, encode
from steploop.core.state.train_state import TrainState
from steploop.errors import CheckpointUnsupportedError, ConfigError, DataError

__all__ = ["Capsule", "fill_capsule", "read_capsule"]

_FORMAT = 1


def fill_capsule(
    folder: Path,
    states: Mapping[str, TrainState],
    seen: Mapping[str, Any],
    batch: Any,
    *,
    phase: int,
    run: Path,
) -> None:
    """Write a capsule into an empty directory.

    Args:
        folder: the directory.
        states: name -> the state before the step, settled; a single one has the name "".
        seen: name -> what was seen of its step, for JSON.
        batch: what the step was taken on; its place alone is kept where it cannot be written.
        phase: which phase of the recipe it belongs to, from 0.
        run: the run's directory, whose recipe and configuration are copied.
    """
    single = states[""] if list(states) == [""] else None
    # parameters that were not finite before the step are what a replay is to find
    checkpoint.save(states if single is None else single, folder / "state", require_finite=False)
    lead = next(iter(states.values()))
    tensors: dict[str, Tensor] = {}
    structure, why = None, None
    try:
        structure = encode(batch, tensors)
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, str(folder / "batch.safetensors")
        )
    except CheckpointUnsupportedError as error:
        structure, why = None, str(error)
    about = {
        "format": _FORMAT,
        "phase": phase,
        "attempted": lead.attempted_steps,
        "epoch": lead.epoch,
        "batch": lead.batch,
        "device": str(lead.device),
        "torch": torch.__version__,
        "states": seen,
        "structure": structure,
        "batch_missing": why,
    }
    text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    (folder / "capsule.json").write_text(text, encoding="utf-8")
    for name in ("recipe.py", "config.json"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


@attrs.frozen(kw_only=True, eq=False)
class Capsule:
    """A capsule that was read, without its state.

    Attributes:
        path: the directory.
        about: ``capsule.json``.
        config: ``config.json`` of the run; empty where there was none.
        batch: what the step was taken on, on the CPU; None where only its place is known.
    """

    path: Path
    about: Mapping[str, Any]
    config: Mapping[str, Any]
    batch: Any


def read_capsule(path: Path) -> Capsule:
    """Read a capsule.

    Raises:
        ConfigError: there is none at ``path``.
        DataError: it is damaged, or of a format that this version does not read.
    """
    if not (path / "capsule.json").is_file():
        inner = sorted((path / "capsules").glob("step-*")) or sorted(path.glob("step-*"))
        hint = (
            f"Give one of its capsules, such as {inner[-1]}."
            if inner
            else "Every step of a run without capsules/ was finite."
        )
        raise ConfigError(f"{path} is no capsule: it holds no capsule.json. {hint}")
    try:
        about = json.loads((path / "capsule.json").read_text(encoding="utf-8"))
        if about.get("format") != _FORMAT:
            raise DataError(
                f"{path} is a capsule of format {about.get('format')!r}, but this version reads {_FORMAT}. "
                "Use the steploop version of its config.json."
            )
        config = (
            json.loads((path / "config.json").read_text(encoding="utf-8"))
            if (path / "config.json").is_file()
            else {}
        )
        structure = about.get("structure")
        batch = None
        if structure is not None:
            file = path / "batch.safetensors"
            batch = decode(structure, load_file(str(file)) if file.is_file() else {})
    except (ValueError, KeyError, AttributeError, OSError) as error:
        raise DataError(
            f"{path} cannot be read: {type(error).__name__}: {error}. It was damaged or cut short."
        ) from error
    return Capsule(path=path, about=about, config=config, batch=batch)
