"""Read what became of each member of a sweep from its run directory."""

from collections.abc import Mapping
from typing import Any

import attrs

from steploop.errors import SteploopError
from steploop.runs.reading import RunRecord, read_run
from steploop.runs.standing import is_run
from steploop.tools.report.results import result_of
from steploop.tools.sweep.member_ends import read_end
from steploop.tools.sweep.sweep_record import Member, SweepRecord

__all__ = ["MemberResult", "read_member", "read_members"]


@attrs.frozen(kw_only=True)
class MemberResult:
    """What became of a member.

    Attributes:
        number: from 0.
        settings: what tells it from the others.
        run: its directory.
        state: waiting, running, finished, interrupted, pruned, failed, died or unknown.
        metric: the name of its result; None before the first evaluation.
        mode: "min" or "max": which values of it are good; None where the recipe monitors nothing.
        value: the best evaluation, or the last where nothing is monitored; None where it is not finite.
        steps: optimizer steps.
        seconds: of training and evaluation.
        error: why it failed, safe to print.
    """

    number: int
    settings: Mapping[str, Any]
    run: str
    state: str
    metric: str | None = None
    mode: str | None = None
    value: float | None = None
    steps: int = 0
    seconds: float = 0.0
    error: str | None = None


def read_members(sweep: SweepRecord) -> tuple[MemberResult, ...]:
    """All members of a grid, and those of a search that were begun, by their number."""
    if sweep.search == "grid":
        return tuple(read_member(sweep, member) for member in sweep.members())
    found = (read_member(sweep, Member(number, {})) for number in range(sweep.trials))
    return tuple(result for result in found if result.state != "waiting")


def read_member(sweep: SweepRecord, member: Member) -> MemberResult:
    """What became of one member, as far as it can be read. Settings that are not known come from its run."""
    where, end = sweep.directory(member.number), read_end(sweep, member.number)
    settings = member.settings or (end.settings if end else {})
    common: dict[str, Any] = {"number": member.number, "run": str(where)}
    if not is_run(where):
        state, error = (end.state, end.error) if end else ("waiting", None)
        return MemberResult(**common, settings=settings, state=state, error=error)
    try:
        record = read_run(where)
    except (SteploopError, OSError) as failure:
        return MemberResult(**common, settings=settings, state="unknown", error=str(failure))
    settings = settings or {name: record.fields.get(name) for name in sweep.varied}
    result = result_of(record)
    return MemberResult(
        **common,
        settings=settings,
        state=end.state if end and record.state in {"interrupted", "died"} else record.state,
        metric=None if result is None else result.metric,
        mode=_mode(record),
        value=None if result is None else result.value,
        steps=record.steps,
        seconds=round(record.time_s, 3),
        error=record.status.error if record.state == "failed" else None,
    )


def _mode(record: RunRecord) -> str | None:
    """Which values of the monitored metric are good, by the last phase that config.json records."""
    phases = record.config.get("phases")
    last = phases[-1] if isinstance(phases, list) and phases else None
    pair = last.get("monitor") if isinstance(last, dict) else None
    known = isinstance(pair, list) and len(pair) == 2 and pair[0] is not None and pair[1] in {"min", "max"}
    return str(pair[1]) if known and pair is not None else None
