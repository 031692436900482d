"""What a member's run directory cannot say: that a search pruned it, or that it failed before it began."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import attrs

from steploop.errors import DataError
from steploop.runs.directory_reader import read_record
from steploop.runs.safe_text import safe_lines
from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["End", "end_name", "read_end"]

_LIMIT = 1 << 16  # bytes


def end_name(number: int) -> str:
    """The file in a sweep's directory that says how a member ended."""
    return f"{number:03d}.end.json"


@attrs.frozen
class End:
    """How a member ended.

    Attributes:
        state: "pruned" or "failed".
        error: why it failed, safe to print.
        settings: those of the member.
    """

    state: str
    error: str | None
    settings: Mapping[str, Any]


def read_end(sweep: SweepRecord, number: int) -> End | None:
    """What ``write_end`` noted; None if it noted nothing."""
    said: dict[str, Any] | None = None
    with suppress(DataError):
        said = read_record(sweep.path, end_name(number), limit=_LIMIT)
    if said is None or said.get("state") not in {"pruned", "failed"}:
        return None
    error, settings = said.get("error"), said.get("settings")
    return End(
        said["state"],
        safe_lines(error) if isinstance(error, str) else None,
        settings if isinstance(settings, dict) else {},
    )
