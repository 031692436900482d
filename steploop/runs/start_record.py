"""Write config.json and the copy of the recipe when a run begins, and announce it."""

import sys
from collections.abc import Mapping
from typing import Any

from steploop import __version__
from steploop.core.state.several import members
from steploop.recipe.recipe import Recipe
from steploop.runs.beginning import Beginning
from steploop.runs.directory import RunDirectory, json_bytes, read_json, write_durably
from steploop.runs.environment import git_commit, versions
from steploop.runs.logger_options import LOGGER_OPTIONS
from steploop.runs.logs.screens import Screen
from steploop.runs.members import lead
from steploop.runs.ranks.parts_of_run import ranks_record
from steploop.runs.recorded_phases import recorded_phase
from steploop.runs.requests import Request

__all__ = ["announce", "record", "record_phase"]


def record(request: Request, beginning: Beginning, tuning: Mapping[str, int]) -> None:
    """Write config.json and the copy of the recipe.

    Raises:
        CheckpointWriteError: they cannot be written.
    """
    directory, recipe = request.directory, beginning.recipe
    path = request.recipe.path.resolve()
    phases = _phases(request.recorded, beginning)
    if beginning.unsaved:  # the record of what the checkpoint holds stays until another one is saved
        phases[-1] = {**beginning.before, "unsaved": True}
    about = {
        "steploop": __version__,
        "recipe": {
            "path": str(path),
            "name": request.recipe.name,
            "sha256": request.recipe.sha256,
            "modules": dict(request.modules),
        },
        "config": request.settings,
        "epochs_from": 1,  # in the lines of metrics.jsonl; 0.1.0 counted from 0
        "device": str(request.device),
        "precision": lead(recipe.state).precision,
        "data": phases[0].get("data", {}).get("note", recipe.data),
        "init": None if request.init is None else request.init.to_json(),
        "states": [name for name in members(recipe.state) if name],
        "phases": phases,
        "versions": versions(),
        "git_commit": git_commit(path.parent),
        "command": list(request.command or sys.argv),
        "tuning": dict(tuning),
        "compile": recipe.compile if request.compile is None else request.compile,
        "watching": watching(request),
        **ranks_record(request.ranks),
        "launched_by": request.launched_by,
        **({"vectorised": True} if request.vectorised else {}),
    }
    if request.resume and directory.recipe.exists():
        if directory.recipe.read_bytes() != request.recipe.source:
            write_durably(directory.recipe, request.recipe.source)
        write_durably(directory.config, json_bytes(about))
        return
    # the first of the two makes the directory a run's, which can be gone on with from then on
    write_durably(directory.config, json_bytes(about))
    write_durably(directory.recipe, request.recipe.source)


def record_phase(directory: RunDirectory, beginning: Beginning) -> None:
    """Add a phase that begins to config.json.

    Raises:
        CheckpointDamagedError: config.json cannot be read.
        CheckpointWriteError: it cannot be written.
    """
    about = read_json(directory.config)
    about["phases"] = _phases(about, beginning)
    write_durably(directory.config, json_bytes(about))


def _phases(recorded: Mapping[str, Any], beginning: Beginning) -> list[Mapping[str, Any]]:
    """The records of the phases up to the one that begins; those of a run of version 0.1.0 are empty."""
    before = [recorded_phase(recorded, number) for number in range(beginning.phase)]
    weights = beginning.weights or recorded_phase(recorded, beginning.phase).get("evaluated")
    return [*before, {**beginning.record, "evaluated": weights}]


def watching(request: Request) -> dict[str, Any]:
    """How the run is logged and kept, which a resume goes on with unless it is given otherwise."""
    plan = request.plan
    of_plan = {name: getattr(plan, name) for name in ("log_every", "checkpoint_every", "layer_norms")}
    return of_plan | {name: getattr(request, name) for name in LOGGER_OPTIONS}


def announce(request: Request, recipe: Recipe, screen: Screen) -> None:
    """Say what is about to be trained, on what, and where."""
    states = members(recipe.state).values()
    count = sum(p.numel() for one in states for p in one.params.values())
    precision = lead(recipe.state).precision
    screen.note(
        f"{request.recipe.name}: {count:,} parameters, {precision} on {request.device}, {request.directory.given}"
    )
    for note in (f"data: {recipe.data}" if recipe.data else "", *recipe.notes):
        if note:
            screen.note(note)
