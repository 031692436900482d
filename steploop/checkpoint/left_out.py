"""Leave frozen parameters out of a checkpoint: save a digest of each, load the values from the caller's state."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from steploop.core.state.sharded import is_sharded
from steploop.core.state.train_state import TrainState
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError

__all__ = ["frozen_digests", "taken_from"]

_BLOCK = 1 << 24  # elements that are brought to the host at a time
_known: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # tensor -> (its version counter, digest): they never change


def frozen_digests(state: TrainState) -> dict[str, str]:
    """Name -> SHA-256 of each parameter that is not trained. Computed once for each tensor."""
    trained = set(state.machine.trainable)
    return {name: _digest(p) for name, p in state.tensors.params.items() if name not in trained}


def _digest(tensor: Tensor) -> str:
    found: tuple[int, str] | None = _known.get(tensor)  # type: ignore[no-untyped-call]
    if found is None or found[0] != tensor._version:
        sha256 = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        # of a sharded one every rank asks at the same time
        whole = tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]
        for block in torch.split(whole.reshape(-1), _BLOCK):
            plain = block.resolve_conj().resolve_neg().cpu().contiguous()
            sha256.update(plain.view(torch.uint8).numpy().data)
        found = _known[tensor] = tensor._version, sha256.hexdigest()
    return found[1]


def taken_from(like: TrainState, saved: Any, names: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Saved name -> a copy of the caller's value, of each parameter that was left out.

    Args:
        like: the caller's state.
        saved: name -> digest, of a manifest.
        names: saved name -> name in ``like``, where they differ.

    Raises:
        CheckpointIncompatibleError: the caller's values are others, or it has no such parameter.
        CheckpointDamagedError: the manifest says nothing that steploop writes.
    """
    if not isinstance(saved, dict) or not all(isinstance(x, str) for pair in saved.items() for x in pair):
        raise CheckpointDamagedError(
            "The parameters that the manifest leaves out are not what steploop writes."
        )
    found = {}
    for name, digest in saved.items():
        here = names.get(name, name)
        tensor = None if here is None else like.tensors.params.get(here)
        if tensor is None or _digest(tensor) != digest:
            what = "this state has no such parameter" if tensor is None else "it has other values here"
            raise CheckpointIncompatibleError(
                f"The frozen parameter {name} was left out of the checkpoint, and {what}. Load it into a state with the frozen "
                "weights that it was trained with."
            )
        found[name] = tensor.detach().clone()
    return found
