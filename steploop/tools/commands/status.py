"""``steploop status``: what a scheduler's requeue script needs to know of a run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["status"]

RUN = typer.Argument(help="The directory of a run.", show_default=False, metavar="RUN")
JSON = typer.Option("--json", help="Print one JSON object.")


def status(run: Annotated[Path, RUN], *, as_json: Annotated[bool, JSON] = False) -> None:
    """Say whether RUN is finished, interrupted, failed, died or running (where), and whether to resume it.

    Read this rather than an exit code: under torchrun a job's code is 1 after SIGTERM even where every rank left well.
    """
    found = describe(run)
    if as_json:
        sys.stdout.write(json.dumps(found, allow_nan=False) + "\n")
        return
    who = f", process {found['pid']} on {found['host']}" if found["state"] == "running" else ""
    sys.stdout.write(f"{run}: {found['state']}{who}\n")
    taken = "unknown" if found["step"] is None else found["step"]
    sys.stdout.write(f"steps: {taken}, checkpoint: {found['checkpoint'] or 'none'}\n")
    if found["error"]:
        sys.stdout.write(f"{found['error']}\n")
    if found["resume"]:
        sys.stdout.write(f"go on with: steploop resume {run}\n")


def describe(run: Path) -> dict[str, Any]:
    """The state of a run as plain values.

    Returns:
        "state" (finished, interrupted, failed, died, running), "pid", "host", "exit_code", "step" (the last that is
        known to be taken, or None), "checkpoint" (the newest one's path or None), "error", and "resume": whether
        resuming it would train on.
    """
    from steploop.runs.directory import open_directory, read_status
    from steploop.runs.directory_lock import run_owner

    directory = open_directory(run)
    written = read_status(directory)
    owner = run_owner(directory.path)
    state = str(written.get("state", "running"))  # the first that a run writes says so
    if owner is not None:
        state = "running"
    elif state == "running":  # nobody holds the lock: the process is gone without a word
        state = "died"
    checkpoints = [*directory.path.glob("checkpoints*/step-*")]
    newest = max(checkpoints, key=lambda path: (path.parent.name, path.name), default=None)
    return {
        "state": state,
        "pid": owner.pid if owner is not None else written.get("pid"),
        "host": owner.host if owner is not None else written.get("host"),
        "exit_code": written.get("exit_code"),
        "step": _steps(written, newest),
        "checkpoint": None if newest is None else str(newest),
        "error": written.get("error"),
        "resume": state in {"interrupted", "died"} or (state == "failed" and newest is not None),
    }


def _steps(written: dict[str, Any], newest: Path | None) -> int | None:
    """A run that was killed wrote no status since its last evaluation; its last checkpoint may be younger."""
    known = [written.get("step", written.get("steps_applied"))]
    if newest is not None and (digits := newest.name.removeprefix("step-")).isdecimal():
        known.append(int(digits))
    return max((step for step in known if step is not None), default=None)
