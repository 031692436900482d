"""Read how a run stands: its status, whether it is running, whether to resume it."""

import os
from pathlib import Path

import attrs

from steploop.errors import ConfigError, DataError
from steploop.runs.directory_lock import Owner, run_owner
from steploop.runs.directory_reader import checkpoint_folders, read_record
from steploop.runs.record_values import Line, Status, checked_config, checked_status

__all__ = ["Standing", "is_run", "read_standing"]


@attrs.frozen(kw_only=True)
class Standing:
    """The status of a run directory, without its metrics.

    Attributes:
        config: what ``config.json`` says; empty if there is none that can be read.
        status: what ``status.json`` says.
        owner: the process that runs in the directory now, or None.
        state: running, finished, interrupted, failed; "died" for a run whose process is gone and whose status does not
            say how it ended; "unknown" for a status that says something else.
        checkpoint: the newest checkpoint, or None.
        resumable: whether resuming the run would train on.
        problems: a sentence for each thing that could not be read.
    """

    config: Line
    status: Status
    owner: Owner | None
    state: str
    checkpoint: Path | None
    resumable: bool
    problems: tuple[str, ...]


def is_run(path: Path) -> bool:
    """Whether a directory looks like a run, possibly a damaged one."""
    return path.is_dir() and any(os.path.lexists(path / name) for name in ("config.json", "metrics.jsonl"))


def read_standing(path: Path) -> Standing:
    """Read how the run in a directory stands, as far as it can be read. Whether it runs is asked of its lock.

    Raises:
        ConfigError: there is no run in it.
    """
    if not is_run(path):
        what = "holds no run (there is no config.json)" if path.is_dir() else "is no directory"
        raise ConfigError(
            f"{path} {what}. Give the directory that steploop run wrote, such as runs/cifar_amp-1."
        )
    problems: list[str] = []
    try:
        written = read_record(path, "config.json")
        config = {} if written is None else checked_config(written, problems)
    except DataError as error:
        written, config = None, {}
        problems.append(str(error))
    usable = written is not None and not problems
    owner = run_owner(path)
    status, wrong = _read_status(path)
    if owner is None and status.state == "running":  # it may have begun or ended between the two looks
        owner = run_owner(path)
        status, wrong = _read_status(path)
    problems += wrong
    state = _state(status, owner)
    folders = checkpoint_folders(path)
    return Standing(
        config=config,
        status=status,
        owner=owner,
        state=state,
        checkpoint=folders[-1] if folders else None,
        resumable=usable
        and (state in {"interrupted", "died", "unknown"} or (state == "failed" and bool(folders))),
        problems=tuple(problems),
    )


def _read_status(path: Path) -> tuple[Status, list[str]]:
    """Read ``status.json``, and say what is wrong with it."""
    problems: list[str] = []
    # the first status that a run writes says "running": without one it was killed before; and a power loss may have
    # left half of one
    unsaid = Status(state="running")
    try:
        said = read_record(path, "status.json")
    except DataError as error:
        return unsaid, [str(error)]
    return unsaid if said is None else checked_status(said, problems), problems


def _state(status: Status, owner: Owner | None) -> str:
    if owner is not None:
        return "running"
    # a run says "running" from its start on: if it holds no lock, its process is gone without a word
    return "died" if status.state == "running" else status.state or "unknown"
