"""``steploop status``: tell a requeue script how a run stands."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steploop.errors import DataError
from steploop.tools.commands.completion import complete_run

if TYPE_CHECKING:
    from steploop.runs.standing import Standing

__all__ = ["status"]

_STATE_LIMIT = 32 << 20  # bytes, as many as a checkpoint's state.json may have

RUN = typer.Argument(
    help="The directory of a run.", show_default=False, metavar="RUN", autocompletion=complete_run
)
JSON = typer.Option("--json", help="Print one JSON object.")


def status(run: Annotated[Path, RUN], *, as_json: Annotated[bool, JSON] = False) -> None:
    """Say how RUN stands, and whether to resume it.

    Finished, interrupted, failed, died or running (and where).

    Read this rather than an exit code: under torchrun a job's code is 1 after SIGTERM even where every rank left well.
    """
    found = describe(run)
    if as_json:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
        return
    from steploop.runs.safe_text import safe_lines

    who = f", process {found['pid']} on {found['host']}" if found["state"] == "running" else ""
    taken = "unknown" if found["step"] is None else found["step"]
    lines = [
        f"{run}: {found['state']}{who}{_how(found)}",
        f"steps: {taken}, checkpoint: {found['checkpoint'] or 'none'}",
        *found["problems"],
        *([f"go on with: {found['command']}"] if found["resume"] else []),
    ]
    if found["error"]:  # its further lines are indented, so that they are not taken for ours
        lines.insert(2, found["error"].replace("\n", "\n  "))
    sys.stdout.write("".join(f"{safe_lines(line)}\n" for line in lines))


def describe(run: Path) -> dict[str, Any]:
    """Describe the state of a run as plain values.

    Returns:
        "state" (finished, interrupted, failed, died, running, unknown), "pid", "host", "exit_code", "ending" (of a
        finished run: finished, early_stop, or limit for one that could train on), "step" (the last that is known to be
        taken, or None), "checkpoint" (the newest one's path or None), "error", "resume": whether it stopped before it was
        meant to, "command": the words that go on with it, and "problems": a sentence for each record that could not be read.

    Raises:
        ConfigError: there is no run in the directory.
    """
    from steploop.runs.resume_command import resume_command
    from steploop.runs.standing import read_standing
    from steploop.runs.text_names import readable

    standing = read_standing(run)
    said, owner, newest = standing.status, standing.owner, standing.checkpoint
    saved = None if newest is None else int(newest.name.removeprefix("step-"))
    # a run that was killed wrote no status since its last evaluation; its last checkpoint may be younger
    known = [step for step in (said.step, saved) if step is not None]
    return {
        "state": standing.state,
        "pid": said.pid if owner is None else owner.pid,
        "host": said.host if owner is None else owner.host,
        "exit_code": said.exit_code,
        "ending": said.ending if standing.state == "finished" else None,
        "step": max(known, default=None),
        "checkpoint": None if newest is None else str(newest),
        "error": said.error,
        "resume": standing.resumable,
        "command": resume_command(readable(run), restart_epoch=_restarts(standing)),
        "problems": list(standing.problems),
    }


def _how(found: Mapping[str, Any]) -> str:
    """How a finished run ended, unless by its last epoch."""
    if found["ending"] == "limit":
        return f", at the limit of steps; {found['command']} trains on"
    return ", by early stopping" if found["ending"] == "early_stop" else ""


def _restarts(standing: "Standing") -> bool:
    """Whether the run stands in the middle of an epoch of a stream that cannot begin there."""
    from steploop.runs.directory_reader import read_record

    newest = standing.checkpoint
    if newest is None:
        return False
    number = newest.parent.name.removeprefix("checkpoints-phase-")
    try:
        phase = standing.config["phases"][int(number) - 1 if number.isdecimal() else 0]
        states = (read_record(newest, "state.json", limit=_STATE_LIMIT) or {})["state"]["states"]
        batch, per_epoch = next(iter(states.values()))["batch"], phase["batches"]["per_epoch"]
        return phase["restorable"] is False and 0 < batch < per_epoch
    except (
        DataError,
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
    ):  # 0.1.0, or damaged: resume will say it
        return False
