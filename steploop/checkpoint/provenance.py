"""Record where a checkpoint was written, and compare it with where it is loaded.

None of it belongs to the state, so it stands in a file of its own, outside of the checkpoint's digest: equal runs on
two machines give equal digests.
"""

import os
import platform
import socket
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

import steploop
from steploop.checkpoint.format.manifest import read_small
from steploop.checkpoint.format.sealing import seal, unseal
from steploop.checkpoint.storage.local import Fs
from steploop.core.ranks import Ranks
from steploop.errors import CheckpointIncompatibleError

__all__ = [
    "ENVIRONMENT",
    "InexactResumeWarning",
    "check_environment",
    "environment_bytes",
    "read_environment",
]

ENVIRONMENT: Final = "environment.json"
_LIMIT: Final = 64 << 10  # bytes

# What the last bits of a result were seen to depend on (thread counts and vector units give other sums).
_EXACT: Final = (
    "torch", "python", "machine", "cpu_capability", "threads", "world_size", "device", "default_dtype", "deterministic",
    "matmul_precision", "parts",
)  # fmt: skip


class InexactResumeWarning(UserWarning):
    """A run resumes in an environment where the last bits of its results may differ.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", checkpoint.InexactResumeWarning)  # resume on any machine, silently
    """


def describe_environment(device: torch.device, ranks: Ranks | None = None) -> dict[str, Any]:
    """Describe what results depend on in this process."""
    parts = {} if ranks is None else {"parts": ranks.parts}
    return parts | {
        "steploop": steploop.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": torch.distributed.get_world_size() if _distributed() else 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def environment_bytes(device: torch.device, ranks: Ranks | None = None) -> bytes:
    """Write ``environment.json``: the environment, the time and the writer."""
    writer = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname().encode("ascii", "replace").decode(),
        "pid": os.getpid(),
    }
    return seal({**describe_environment(device, ranks), **writer})[0]


def read_environment(fs: Fs, directory: Path) -> dict[str, Any]:
    """Read a checkpoint's environment file.

    Raises:
        CheckpointDamagedError: it is missing or damaged.
    """
    text = read_small(fs, directory, ENVIRONMENT, limit=_LIMIT)
    return unseal(text, str(directory / ENVIRONMENT), limit=_LIMIT)


def check_environment(
    written: Mapping[str, Any],
    device: torch.device,
    *,
    require_exact: bool,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> None:
    """Warn of differences to the checkpoint's environment that may change the last bits; of ranks rank 0 does.

    With a fixed number of parts and exact sums the number of processes is no difference.

    Raises:
        CheckpointIncompatibleError: there are some, and ``require_exact``.
    """
    here = {"parts": 1} | describe_environment(device, ranks)
    there = {"parts": 1} | dict(written)
    if ranks is not None and ranks.exact and not sharded:
        there["world_size"] = here["world_size"]
    differences = [
        f"{key} {there.get(key)} there, {here[key]} here" for key in _EXACT if there.get(key) != here[key]
    ]
    if not differences:
        return
    message = f"The checkpoint was written in another environment: {'; '.join(differences)}. "
    if require_exact:
        raise CheckpointIncompatibleError(
            message + "An exact resume was required: go on where it was written."
        )
    if ranks is not None and ranks.rank > 0:
        return
    warnings.warn(
        message + "The run goes on, but its last bits may differ from those of an uninterrupted one.",
        InexactResumeWarning,
        stacklevel=5,
    )
