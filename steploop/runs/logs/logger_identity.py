"""Remembers which run of a tracking service belongs to a run directory, so that a resume goes on with it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steploop.core.atomic_files import replace_file
from steploop.errors import DataError
from steploop.runs.directory_reader import read_record

__all__ = ["recall", "remember"]

_FILE = "loggers.json"


def recall(directory: Path, service: str) -> dict[str, str]:
    """What ``remember`` wrote for a service; {} if it wrote nothing, or something that is damaged now."""
    entry = _read(directory).get(service)
    return {k: v for k, v in entry.items() if isinstance(v, str)} if isinstance(entry, dict) else {}


def remember(directory: Path, service: str, values: Mapping[str, str]) -> None:
    """Write down the identity of a run of a service."""
    data = {**_read(directory), service: dict(values)}
    replace_file(directory / _FILE, json.dumps(data, indent=2).encode() + b"\n")


def _read(directory: Path) -> dict[str, Any]:
    try:
        return read_record(directory, _FILE) or {}
    except DataError:
        return {}
