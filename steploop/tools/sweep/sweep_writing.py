"""Write what a sweep is, and how members of it ended."""

from contextlib import suppress

import attrs

from steploop.core.atomic_files import replace_file
from steploop.runs.directory import json_bytes, write_durably
from steploop.tools.sweep.member_ends import end_name
from steploop.tools.sweep.search_space import Choices
from steploop.tools.sweep.sweep_record import FORMAT, Member, SweepRecord

__all__ = ["clear_end", "write_end", "write_sweep"]

_LONGEST = 4000  # characters of an error


def write_sweep(sweep: SweepRecord) -> None:
    """Write sweep.json; it is on the disk when this returns.

    Raises:
        CheckpointWriteError: it cannot be written.
    """
    space = {
        name: list(s.values)
        if isinstance(s, Choices)
        else {"low": s.low, "high": s.high, "log": s.log, "whole": s.whole}
        for name, s in sweep.space.items()
    }
    fields = attrs.asdict(sweep, recurse=False, filter=lambda a, _: a.name != "path")
    value = {"format": FORMAT, **fields, "space": space, "seeds": list(sweep.seeds)}
    write_durably(sweep.path / "sweep.json", json_bytes(value))


def write_end(sweep: SweepRecord, member: Member, state: str, error: str | None = None) -> None:
    """Note how a member ended. A full disk must not hide the error itself."""
    about = {"state": state, "error": error and error[:_LONGEST], "settings": dict(member.settings)}
    with suppress(OSError):
        replace_file(sweep.path / end_name(member.number), json_bytes(about), durable=True)


def clear_end(sweep: SweepRecord, number: int) -> None:
    """Forget how a member ended: it begins again."""
    (sweep.path / end_name(number)).unlink(missing_ok=True)
