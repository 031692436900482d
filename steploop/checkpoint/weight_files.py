"""Read weights from checkpoints of steploop and from safetensors files of others."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steploop.checkpoint.format.manifest import MANIFEST
from steploop.checkpoint.opening import Checkpoint, open_checkpoint
from steploop.checkpoint.packing import MODEL_FILE, OPTIMIZER_FILE
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError, ConfigError

__all__ = ["WeightFile", "read_weights", "weights_of"]

_INDEX: Final = "model.safetensors.index.json"  # of Hugging Face: which of several files holds which tensor
_MOST_INDEX_BYTES: Final = 16 << 20
_PICKLES: Final = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar"}
_AVERAGES: Final = "ema."


@attrs.frozen
class WeightFile:
    """Weights as they were found.

    Attributes:
        path: where.
        tensors: name -> tensor, in memory of their own.
        aliases: further name -> name, of tensors that stand in several places of the model.
        left_out: names of frozen parameters that the checkpoint was saved without.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    left_out: tuple[str, ...] = ()


def read_weights(path: Path | str, *, average: bool = False) -> WeightFile:
    """The weights in a checkpoint, a safetensors file, or a directory that holds ``model.safetensors`` (or its shards).

    Args:
        path: of any of these.
        average: of a checkpoint: the averaged weights instead of the raw ones.

    Raises:
        ConfigError: there is nothing of the kind; or it is a pickle, which is never read.
        CheckpointDamagedError: it cannot be read, or a checkpoint does not verify.
        CheckpointIncompatibleError: ``average``, and there are no averages.
    """
    place = Path(path)
    if place.is_dir() and os.path.lexists(place / MANIFEST):
        return weights_of(open_checkpoint(place), average=average)
    if average:
        raise CheckpointIncompatibleError(
            f"{place} holds one set of weights, no averages. Leave average out."
        )
    if not place.is_dir():
        return WeightFile(place, _read_file(place))
    if (place / _INDEX).is_file():
        return WeightFile(place, _read_shards(place))
    if (place / MODEL_FILE).is_file():
        return WeightFile(place / MODEL_FILE, _read_file(place / MODEL_FILE))
    raise ConfigError(
        f"{place} holds no weights: neither a {MANIFEST} (a checkpoint of steploop) nor a {MODEL_FILE}. Name a checkpoint, "
        "such as runs/digits-1/checkpoints/step-000000000390, or a .safetensors file."
    )


def weights_of(checkpoint: Checkpoint, *, average: bool) -> WeightFile:
    """The parameters and buffers of a checkpoint, under all names that they have in the model.

    Raises:
        CheckpointIncompatibleError: ``average``, and a state carries none.
        CheckpointDamagedError: the manifest says nothing that steploop writes.
    """
    tensors = dict(checkpoint.tensors[MODEL_FILE])
    states = _parameters(checkpoint)
    left_out = [prefix + name for prefix, names in states for name in names if prefix + name not in tensors]
    if average:
        for prefix, names in states:
            held = checkpoint.tensors[OPTIMIZER_FILE]
            averages = {
                name: held.get(f"{prefix}{_AVERAGES}{name}")
                for name in names
                if prefix + name not in left_out
            }
            if missing := [name for name, tensor in averages.items() if tensor is None]:
                raise CheckpointIncompatibleError(
                    f"{checkpoint.directory} holds no average of {prefix}{missing[0]}: its run was not created with ema=True. "
                    "Take the raw weights."
                )
            tensors |= {prefix + name: tensor for name, tensor in averages.items() if tensor is not None}
    try:
        about = json.loads(checkpoint.manifest.metadata[MODEL_FILE])
        aliases = {str(name): str(first) for name, first in about["aliases"].items() if str(first) in tensors}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(checkpoint) from error
    return WeightFile(checkpoint.directory, tensors, aliases, tuple(left_out))


def _parameters(checkpoint: Checkpoint) -> list[tuple[str, list[str]]]:
    """For each state of a checkpoint, what its names begin with, and the names of its parameters."""
    try:
        states: Mapping[str, Any] = checkpoint.manifest.state["states"]
        return [(f"{name}." if name else "", list(values["params"])) for name, values in states.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise _no_manifest(checkpoint) from error


def _no_manifest(checkpoint: Checkpoint) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{checkpoint.directory / MANIFEST} is nothing that steploop writes.")


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Links are followed: a Hugging Face cache is made of them."""
    if path.suffix in _PICKLES:
        raise ConfigError(
            f"{path} is a pickle, which can run code, and steploop reads none. Convert it once, where you trust it: load it with "
            "torch (weights_only=True) and write its tensors with safetensors.torch.save_file."
        )
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"There are no weights at {path} ({error.strerror}). Name a .safetensors file or a checkpoint."
        ) from error
    if not regular:  # a FIFO would be waited for
        raise ConfigError(f"{path} is no regular file. Name a .safetensors file or a checkpoint.")
    try:
        # pread, for a file that is mapped and then cut short ends the process
        with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
            tensors: dict[str, Tensor] = file.get_tensors()
            about = (file.metadata() or {}).get("steploop")
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointDamagedError(f"{path} is no safetensors file that can be read: {error}.") from error
    return _complex(tensors, about)


def _complex(tensors: dict[str, Tensor], about: str | None) -> dict[str, Tensor]:
    """Values of complex128 are stored by steploop as pairs of float64."""
    try:
        names = set(json.loads(about)["complex128"]) if about else set()
    except (ValueError, KeyError, TypeError):
        names = set()
    return {
        n: torch.view_as_complex(t) if n in names and t.shape[-1:] == (2,) else t for n, t in tensors.items()
    }


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of several files that an index names."""
    index = folder / _INDEX
    try:
        if index.stat().st_size > _MOST_INDEX_BYTES:
            raise CheckpointDamagedError(f"{index} is larger than any index.")
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{index} is no index of safetensors files: {error}.") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        if Path(name).name != name or name.startswith("."):
            raise CheckpointDamagedError(f"{index} names {name!r}, which is not a file in its folder.")
        tensors |= _read_file(folder / name)
    return tensors
