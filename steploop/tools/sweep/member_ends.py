"""What a member's run directory cannot say: that a search pruned it, or that it failed before it began."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import attrs

from steploop.errors import DataError
from steploop.runs.atomic_files import replace_file
from steploop.runs.directory import json_bytes
from steploop.runs.directory_reader import read_record
from steploop.runs.safe_text import safe_lines
from steploop.tools.sweep.sweep_record import Member, SweepRecord

__all__ = ["End", "clear_end", "read_end", "write_end"]

_LIMIT = 1 << 16  # bytes
_LONGEST = 4000  # characters of an error


def _name(number: int) -> str:
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


def write_end(sweep: SweepRecord, member: Member, state: str, error: str | None = None) -> None:
    """Note how a member ended. A full disk must not hide the error itself."""
    about = {"state": state, "error": error and error[:_LONGEST], "settings": dict(member.settings)}
    with suppress(OSError):
        replace_file(sweep.path / _name(member.number), json_bytes(about), durable=True)


def read_end(sweep: SweepRecord, number: int) -> End | None:
    """What ``write_end`` noted; None if it noted nothing."""
    said: dict[str, Any] | None = None
    with suppress(DataError):
        said = read_record(sweep.path, _name(number), limit=_LIMIT)
    if said is None or said.get("state") not in {"pruned", "failed"}:
        return None
    error, settings = said.get("error"), said.get("settings")
    return End(
        said["state"],
        safe_lines(error) if isinstance(error, str) else None,
        settings if isinstance(settings, dict) else {},
    )


def clear_end(sweep: SweepRecord, number: int) -> None:
    """Forget how a member ended: it begins again."""
    (sweep.path / _name(number)).unlink(missing_ok=True)
