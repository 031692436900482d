"""vectorise.json beside sweep.json: which members of a sweep train as one population, and why others do not."""

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from steploop.errors import CheckpointDamagedError, ConfigError, DataError
from steploop.runs.directory import json_bytes, write_durably
from steploop.runs.directory_reader import read_record
from steploop.runs.ranks.launcher import several_ranks
from steploop.runs.record_values import is_count
from steploop.tools.sweep.sweep_record import SweepRecord

__all__ = ["Vectorised", "begin_vectorising", "read_vectorised", "refuse_with", "write_vectorised"]

_MODES = ("auto", "on", "off")
_NAME = "vectorise.json"


@attrs.frozen
class Vectorised:
    """How the members of a sweep are trained.

    Attributes:
        mode: "auto" or "on".
        groups: "members" of each population; with "auto" also the "figures" by which it was chosen.
        apart: "members" that train as runs of their own, and the "reason".
    """

    mode: str
    groups: Sequence[Mapping[str, Any]] = ()
    apart: Sequence[Mapping[str, Any]] = ()

    @property
    def decided(self) -> frozenset[int]:
        """The members of which it is known how they train."""
        return frozenset(n for one in (*self.groups, *self.apart) for n in one["members"])


def read_vectorised(sweep: SweepRecord) -> Vectorised | None:
    """What vectorise.json says; None for a sweep whose members all train as runs of their own.

    Raises:
        CheckpointDamagedError: it is not what a sweep writes.
    """
    try:
        said = read_record(sweep.path, _NAME)
    except DataError as error:
        raise CheckpointDamagedError(str(error)) from error
    if said is None:
        return None
    lists = [said.get("groups"), said.get("apart")]
    numbers = [
        n
        for one in lists
        if isinstance(one, list)
        for group in one
        for n in (group.get("members") or [None] if isinstance(group, dict) else [None])
    ]
    right = said.get("format") == 1 and said.get("mode") in _MODES and all(isinstance(x, list) for x in lists)
    known = all(is_count(n) and int(n) < sweep.size for n in numbers if n is not None)
    if not right or not known or None in numbers or len({*numbers}) < len(numbers):
        raise CheckpointDamagedError(
            f"{sweep.path / _NAME} is not what a sweep writes. It was damaged or changed: remove it, and the members train as runs of "
            "their own."
        )
    return Vectorised(said["mode"], tuple(said["groups"]), tuple(said["apart"]))


def write_vectorised(sweep: SweepRecord, said: Vectorised) -> None:
    """Write vectorise.json; it is on the disk when this returns.

    Raises:
        CheckpointWriteError: it cannot be written.
    """
    value = {"format": 1, "mode": said.mode, "groups": list(said.groups), "apart": list(said.apart)}
    write_durably(sweep.path / _NAME, json_bytes(value))


def refuse_with(mode: str, *, search: str, cluster: str | None) -> None:
    """Refuse options that do not go together with ``--vectorise``.

    Raises:
        ConfigError: names them.
    """
    if mode not in _MODES:
        raise ConfigError(f'--vectorise must be "auto", "on" or "off", but is {mode!r}.')
    if mode == "off":
        return
    others = {
        "--search": search != "grid" and "a search proposes its members one after the other",
        "--cluster": cluster is not None and "its members are jobs of their own",
        "several ranks": several_ranks() and "a population is one process",
    }
    for name, why in others.items():
        if why:
            raise ConfigError(
                f"--vectorise {mode} and {name} do not go together: {why}. Leave one of them out."
            )


def begin_vectorising(record: SweepRecord, mode: str) -> None:
    """Note in vectorise.json how a new sweep is to train."""
    if mode != "off":
        write_vectorised(record, Vectorised(mode))
