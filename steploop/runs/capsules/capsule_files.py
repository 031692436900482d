"""Write capsules to the disk, and read them with their batch.

A capsule is a directory in ``capsules/`` of the run::

    step-000000000017/
        state/              the state before the step, as a checkpoint
        batch.safetensors   the tensors of the batch
        capsule.json        where it happened, what was seen, the batch's structure
        recipe.py, config.json   copies of the run's
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from steploop import checkpoint
from steploop.checkpoint.format.batch_files import decode, encode
from steploop.core.state.train_state import TrainState
from steploop.core.state.with_ranks import without_ranks
from steploop.errors import CheckpointUnsupportedError, ConfigError, DataError
from steploop.runs.directory_reader import read_file, read_record, step_folders
from steploop.runs.record_values import checked_config, is_count, is_number

__all__ = ["Capsule", "fill_capsule", "read_capsule"]

_FORMAT = 1
_ABOUT: Final = "capsule.json"
_BATCH: Final = "batch.safetensors"
_LIMIT: Final = 16 << 20  # bytes of capsule.json
_MAX_DEPTH: Final = 256  # a dict in a batch takes three levels of JSON
_HEADER_LIMIT: Final = 1 << 20  # bytes: some ten thousand tensors
_BATCH_LIMIT: Final = 16 << 30  # bytes
_MOST_PHASES: Final = 1000
_MOST_PARTS: Final = 1 << 20


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
        states: name -> the state before the step, settled; a single one has the name "". Written by this process alone.
        seen: name -> what was seen of its step, for JSON.
        batch: what the step was taken on; its place alone is kept where it cannot be written.
        phase: which phase of the recipe it belongs to, from 0.
        run: the run's directory, whose recipe and configuration are copied.
    """
    ranks = next(iter(states.values())).ranks
    states = {name: without_ranks(one) for name, one in states.items()}  # the others write none
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
        "parts": None if ranks is None else ranks.parts,
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
    about = read_record(path, _ABOUT, limit=_LIMIT, depth=_MAX_DEPTH) if path.is_dir() else None
    if about is None:
        inner = step_folders(path, "capsules") or step_folders(path)
        hint = (
            f"Give one of its capsules, such as {inner[-1]}."
            if inner
            else "Every step of a run without capsules/ was finite."
        )
        raise ConfigError(f"{path} is no capsule: it holds no {_ABOUT}. {hint}")
    if about.get("format") != _FORMAT:
        raise DataError(
            f"{path} is a capsule of format {str(about.get('format'))[:80]}, but this version reads {_FORMAT}. "
            "Use the steploop version of its config.json."
        )
    if problem := _problem(about):
        raise DataError(f"{path / _ABOUT} was damaged or changed: {problem}.")
    problems: list[str] = []
    recorded = read_record(path, "config.json")
    config = {} if recorded is None else checked_config(recorded, problems)
    if problems:
        raise DataError(f"{path} was damaged or changed: {problems[0]}")
    structure = about.get("structure")
    batch = None if structure is None else decode(structure, read_batch(path))
    return Capsule(path=path, about=about, config=config, batch=batch)


_STATE: Final[Mapping[str, Callable[[Any], bool]]] = {
    "skipped": lambda v: isinstance(v, bool),
    "exact": lambda v: isinstance(v, bool),
    "loss": lambda v: v is None or isinstance(v, str),
    "grad_norm": lambda v: v is None or isinstance(v, str),
    "loss_scale": lambda v: v is None or is_number(v),
}


_FIELDS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    **dict.fromkeys(("attempted", "epoch", "batch"), (is_count, "a number of steps")),
    "phase": (lambda v: v is None or (is_count(v) and v <= _MOST_PHASES), "a small number"),
    "parts": (lambda v: v is None or (is_count(v) and 1 <= v <= _MOST_PARTS), "a number from 1"),
    **dict.fromkeys(("device", "torch"), (lambda v: isinstance(v, str), "a text")),
}


def _problem(about: Mapping[str, Any]) -> str | None:
    """Say what in ``capsule.json`` has the wrong type."""
    for name, (fits, what) in _FIELDS.items():
        if not fits(about.get(name)):
            return f"{name} should be {what}, but is {str(about.get(name))[:60]!r}"
    states = about.get("states")
    if not isinstance(states, dict) or not all(isinstance(seen, dict) for seen in states.values()):
        return "states should hold an object for each state"
    for seen in states.values():
        for name, fits_state in _STATE.items():
            if name not in seen or not fits_state(seen[name]):
                return f"{name} of a state is {str(seen.get(name))[:60]!r}"
    return None


def read_batch(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a capsule's batch; none if it has no such file.

    Raises:
        DataError: the file is damaged, or no safetensors file of a batch.
    """
    data = read_file(path, _BATCH, limit=_BATCH_LIMIT)
    if data is None:
        return {}
    if int.from_bytes(data[:8], "little") > _HEADER_LIMIT:  # a header of many megabytes takes minutes to read
        raise DataError(
            f"{path / _BATCH} begins with a header of more than {_HEADER_LIMIT:,} bytes. It was changed."
        )
    try:
        return load(data)
    except (SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"{path / _BATCH} cannot be read: {type(error).__name__}: {str(error)[:200]}. It was damaged or cut short."
        ) from error
