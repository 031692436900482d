"""Write weights as one safetensors file that a plain module takes."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from steploop.checkpoint.opening import Checkpoint
from steploop.checkpoint.weight_files import weights_of
from steploop.errors import (
    CheckpointIncompatibleError,
    CheckpointUnsupportedError,
    CheckpointWriteError,
    ConfigError,
)

__all__ = ["export_weights"]


def export_weights(
    checkpoint: Checkpoint,
    file: Path | str,
    *,
    average: bool = False,
    state: str | None = None,
    partial: bool = False,
    overwrite: bool = False,
) -> int:
    """Write the weights of a checkpoint for ``model.load_state_dict(safetensors.torch.load_file(file))``.

    A tied parameter stands under each of its names, so that a plain ``load_state_dict`` finds all it wants.

    Args:
        checkpoint: from ``open_checkpoint``.
        file: what to write; its directory exists.
        average: the averaged parameters instead of the raw ones; buffers are the same.
        state: of several states the one to write, without its name before its tensors; None: all, each with its name.
        partial: of a checkpoint that was saved without its frozen parameters, write the others.
        overwrite: take the place of a file that has the name.

    Returns:
        How many tensors were written.

    Raises:
        ConfigError: the file exists, or there is no such state.
        CheckpointIncompatibleError: ``average``, and the state carries none; or parameters are left out.
        CheckpointUnsupportedError: a tensor is of a dtype that safetensors lacks.
        CheckpointWriteError: the file cannot be written.
    """
    target = Path(file)
    if os.path.lexists(target) and not overwrite:
        raise ConfigError(f"{target} exists already. Choose another name, or say --overwrite.")
    weights = weights_of(checkpoint, average=average)
    if weights.left_out and not partial:
        raise CheckpointIncompatibleError(
            f"{checkpoint.directory} was saved without its {len(weights.left_out)} frozen parameters ({weights.left_out[0]}, ...), so "
            "that a plain module would miss them. Write the others with --partial, for load_state_dict(..., strict=False)."
        )
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    tensors |= {alias: tensors[first].clone() for alias, first in weights.aliases.items()}
    if state is not None:
        tensors = _of_state(tensors, state)
    if wide := [name for name, tensor in tensors.items() if tensor.dtype == torch.complex128]:
        raise CheckpointUnsupportedError(f"{wide[0]} is complex128, which safetensors files cannot hold.")
    _write(tensors, target)
    return len(tensors)


def _of_state(tensors: dict[str, Tensor], state: str) -> dict[str, Tensor]:
    prefix = f"{state}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not found:
        first = sorted({name.partition(".")[0] for name in tensors})
        raise ConfigError(f"There is no state {state!r}. Tensors begin with: {', '.join(first)}.")
    return found


def _write(tensors: dict[str, Tensor], target: Path) -> None:
    """Write a temporary file and rename it: a reader never sees half a file, and no link is followed."""
    temporary = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = temporary.stat().st_mode  # safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raised = CheckpointWriteError(f"{target} cannot be written: {error}. Choose another place.")
        raised.errno = getattr(error, "errno", None)
        raise raised from error
