"""Find the device of a run, and the versions that it records."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

from steploop import __version__
from steploop.errors import ConfigError

__all__ = ["find_device", "git_commit", "versions"]


def versions() -> dict[str, str]:
    """Collect the versions of the libraries that compute."""
    return {
        "steploop": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out in a folder, ``-dirty`` if files differ; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)  # noqa: S603  (no shell, fixed words)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode().strip() or None


def find_device(name: str) -> torch.device:
    """Find the device called ``auto``, ``cpu``, ``cuda`` (``cuda:1``) or ``mps``.

    Raises:
        ConfigError: this machine has none of that kind, or the name is none.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device must be auto, cpu, cuda or mps, but is {name!r}.") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device.type not in available:
        raise ConfigError(f"--device must be auto, cpu, cuda or mps, but is {name!r}.")
    if not available[device.type]:
        raise ConfigError(
            f"--device {name}: torch finds no such device on this machine. Leave it out, or give cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0."
        )
    return device
