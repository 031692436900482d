"""What a run records when it begins: config.json, the copy of its recipe, and a few lines on the screen."""

import sys
from collections.abc import Mapping
from typing import Any

from steploop import __version__
from steploop.recipe.config_values import to_json
from steploop.recipe.recipe import Recipe
from steploop.runs.directory import json_bytes, write_durably
from steploop.runs.environment import git_commit, versions
from steploop.runs.logs.screens import Screen
from steploop.runs.members import lead, members
from steploop.runs.requests import Request

__all__ = ["announce", "record"]


def record(request: Request, recipe: Recipe, tuning: Mapping[str, int]) -> None:
    """Write config.json and, for a new run, the copy of the recipe.

    Raises:
        CheckpointWriteError: they cannot be written.
    """
    directory = request.directory
    path = request.recipe.path.resolve()
    about = {
        "steploop": __version__,
        "recipe": {"path": str(path), "name": request.recipe.name, "sha256": request.recipe.sha256},
        "config": to_json(request.config),
        "epochs_from": 1,  # in the lines of metrics.jsonl; 0.1.0 counted from 0
        "device": str(request.device),
        "precision": lead(recipe.state).precision,
        "data": recipe.data,
        "versions": versions(),
        "git_commit": git_commit(path.parent),
        "command": list(request.command or sys.argv),
        "tuning": dict(tuning),
        "compile": request.compile,
        "watching": watching(request),
    }
    # the first of the two makes the directory a run's, which can be gone on with from then on
    write_durably(directory.config, json_bytes(about))
    if not (request.resume and directory.recipe.exists()):
        write_durably(directory.recipe, request.recipe.source)


def watching(request: Request) -> dict[str, Any]:
    """How the run is logged and kept, which a resume goes on with unless told otherwise."""
    plan = request.plan
    of_plan = {name: getattr(plan, name) for name in ("log_every", "checkpoint_every", "layer_norms")}
    return of_plan | {name: getattr(request, name) for name in ("tensorboard", "csv", "mlflow", "wandb")}


def announce(request: Request, recipe: Recipe, screen: Screen) -> None:
    """Say what is about to be trained, on what, and where."""
    states = members(recipe.state).values()
    count = sum(p.numel() for one in states for p in one.params.values())
    precision = lead(recipe.state).precision
    screen.note(
        f"{request.recipe.name}: {count:,} parameters, {precision} on {request.device}, {request.directory.path}"
    )
    for note in (f"data: {recipe.data}" if recipe.data else "", *recipe.notes):
        if note:
            screen.note(note)
