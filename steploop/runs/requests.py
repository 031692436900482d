"""From what a command line says to a request: everything that can be refused is refused here, before anything runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from steploop.errors import CheckpointIncompatibleError
from steploop.recipe.config_values import configure, fields_of
from steploop.recipe.recipe_files import RecipeFile, find_recipe, load_recipe_file
from steploop.runs.directory import RunDirectory, make_directory, open_directory, read_json
from steploop.runs.environment import find_device
from steploop.runs.plan import Plan
from steploop.runs.text_names import native

__all__ = ["Request", "make_request", "resume_request"]


@attrs.frozen(kw_only=True)
class Request:
    """What is to be run, and how.

    Attributes:
        recipe: the recipe file.
        config: its Config.
        directory: where the run's files go.
        device: where to train.
        plan: how it is watched and cut off.
        resume: whether the directory holds the run already, to go on with.
        tensorboard: write TensorBoard event files.
        csv: write metrics.csv.
        mlflow: log to MLflow.
        wandb: log to Weights & Biases.
        compile: whether the step is compiled; None: as the recipe says.
        tune: set the allocator's thresholds.
        require_exact: refuse to go on where the bits may come out differently.
        command: the words of the command line, for the record.
    """

    recipe: RecipeFile
    config: Any
    directory: RunDirectory
    device: torch.device
    plan: Plan = attrs.field(factory=Plan)
    resume: bool = False
    tensorboard: bool = False
    csv: bool = False
    mlflow: bool = False
    wandb: bool = False
    compile: bool | Literal["auto"] | None = None
    tune: bool = True
    require_exact: bool = False
    command: Sequence[str] = ()


def _plan(options: dict[str, Any]) -> Plan:
    names = ("log_every", "checkpoint_every", "limit_steps", "layer_norms")
    return Plan(**{name: options.pop(name, None) for name in names})


def _loaded(recipe: str | RecipeFile, *, beside: Path | None = None) -> RecipeFile:
    if isinstance(recipe, RecipeFile):
        return recipe
    return load_recipe_file(find_recipe(recipe), beside=beside)


def make_request(
    recipe: str | RecipeFile,
    values: Mapping[str, Any],
    *,
    out: Path | None = None,
    device: str = "auto",
    **options: Any,
) -> Request:
    """A request for a new run; makes its directory, last of all.

    Args:
        recipe: a path, the name of a shipped recipe, or a recipe that was loaded.
        values: Config field -> text or value.
        out: the directory; None: the next ``runs/<recipe>-<n>``.
        device: "auto", or a device's name.
        options: fields of Plan and of Request.

    Raises:
        ConfigError: a name or a value does not fit.
        RunExistsError: ``out`` is not empty.
        CheckpointWriteError: the directory cannot be made.
    """
    file = _loaded(recipe)
    config = configure(file.config_class, values, where=file.name)
    plan = _plan(options)
    where = find_device(device)
    return Request(
        recipe=file,
        config=config,
        directory=make_directory(out, file.name),
        device=where,
        plan=plan,
        **options,
    )


def resume_request(
    directory: Path,
    recipe: str | RecipeFile | None,
    values: Mapping[str, Any],
    *,
    device: str = "auto",
    **options: Any,
) -> Request:
    """A request to go on with a run.

    Args:
        directory: the run's.
        recipe: the recipe file, if it is to be another than the copy in the run's directory.
        values: Config fields that are to change.
        device: "auto": as before; or a device's name.
        options: fields of Plan and of Request.

    Raises:
        ConfigError: there is no such run, or a name or a value does not fit.
        CheckpointIncompatibleError: ``require_exact``, and the recipe is another one.
    """
    opened = open_directory(directory)
    recorded = read_json(opened.config)
    origin = Path(native(recorded["recipe"]["path"]))
    # a start that was killed may have left no copy
    own = opened.recipe if opened.recipe.exists() else origin
    file = (
        load_recipe_file(own, beside=origin.parent)
        if recipe is None
        else _loaded(recipe, beside=origin.parent)
    )
    if file.sha256 != recorded["recipe"]["sha256"] and options.get("require_exact"):
        raise CheckpointIncompatibleError(
            f"{file.path} is not the recipe of {directory}: its digest differs. Leave it out to go on with the run's own copy."
        )
    name = recorded["recipe"]["name"]
    known = fields_of(file.config_class)
    before = {key: value for key, value in recorded["config"].items() if key in known}
    config = configure(file.config_class, {**before, **values}, where=name)
    for option, value in recorded.get("watching", {}).items():
        options[option] = options.get(option) or value
    plan = _plan(options)
    if options.get("compile") is None:
        options["compile"] = recorded.get("compile")
    where = find_device(recorded["device"] if device == "auto" else device)
    file = RecipeFile(origin, name, file.source, file.sha256, file.module)
    return Request(
        recipe=file, config=config, directory=opened, device=where, plan=plan, resume=True, **options
    )
