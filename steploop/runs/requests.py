"""Turn options into a request, and refuse what does not fit before anything runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from steploop.core.ranks import Ranks
from steploop.core.state.several import members
from steploop.core.state.with_ranks import with_ranks
from steploop.recipe.config_values import configure, fields_of, refuse_unrecordable, settled_paths, to_json
from steploop.recipe.imported_modules import imported_modules
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import RecipeFile, load_recipe_file
from steploop.recipe.recipe_paths import find_recipe
from steploop.runs.contract import Change, changed_code, changed_settings
from steploop.runs.directory import RunDirectory, make_directory, open_directory, read_json
from steploop.runs.environment import find_device
from steploop.runs.initial_weights import InitialWeights
from steploop.runs.plan import Plan
from steploop.runs.ranks.parts_of_run import recorded_ranks, refuse_uncuttable, settled_ranks
from steploop.runs.ranks.team import Team, shared_directory
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
        restart_epoch: begin the epoch anew instead of in its middle, with the data that there are now.
        init: weights to begin with, instead of the recipe's own.
        modules: module -> digest, of those that the recipe imports from its folder.
        recorded: what config.json says of the run; empty for a new one.
        changes: what is not as it says, by the settings and the code.
        command: the words of the command line, for the record.
        ranks: this process among those that train together, and the parts of a batch; None: one process, and whole batches.
        launched_by: what the attempts of one launch by torchrun have in common.
        vectorised: whether its steps are taken by a population of a sweep, whose numbers are near those of a run alone.
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
    restart_epoch: bool = False
    init: InitialWeights | None = None
    modules: Mapping[str, str] = attrs.field(factory=dict)
    recorded: Mapping[str, Any] = attrs.field(factory=dict)
    changes: tuple[Change, ...] = ()
    command: Sequence[str] = ()
    ranks: Ranks | None = None
    launched_by: str | None = None
    vectorised: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The Config as JSON."""
        return to_json(self.config)

    @property
    def known_settings(self) -> dict[str, Any]:
        """The recorded Config as JSON, as far as the recipe has its fields."""
        return _known(self.recorded, self.recipe)

    def build(self) -> Recipe:
        """Build the recipe."""
        return self.with_ranks(self.recipe.build(self.config, self.device))

    def with_ranks(self, recipe: Recipe) -> Recipe:
        """The recipe with its states trained by the ranks of the run."""
        if self.ranks is None:
            return recipe
        refuse_uncuttable(recipe.batches, self.ranks)
        states = {name: with_ranks(one, self.ranks) for name, one in members(recipe.state).items()}
        return attrs.evolve(recipe, state=states if isinstance(recipe.state, Mapping) else states[""])


def _known(recorded: Mapping[str, Any], file: RecipeFile) -> dict[str, Any]:
    fields = fields_of(file.config_class)
    return {key: value for key, value in recorded["config"].items() if key in fields}


def _plan(options: dict[str, Any]) -> Plan:
    names = ("log_every", "checkpoint_every", "limit_steps", "layer_norms")
    return Plan(**{name: options.pop(name, None) for name in names})


def _loaded(recipe: str | RecipeFile) -> RecipeFile:
    return recipe if isinstance(recipe, RecipeFile) else load_recipe_file(find_recipe(recipe))


def make_request(
    recipe: str | RecipeFile,
    values: Mapping[str, Any],
    *,
    out: Path | None = None,
    device: str = "auto",
    team: Team | None = None,
    parts: int | None = None,
    fast: bool | None = None,
    **options: Any,
) -> Request:
    """A request for a new run; makes its directory, last of all.

    Args:
        recipe: a path, the name of a shipped recipe, or a recipe that was loaded.
        values: Config field -> text or value.
        out: the directory; None: the next ``runs/<recipe>-<n>``.
        device: "auto", or a device's name.
        team: the ranks that train together.
        parts: that each batch is cut into; None: one for each rank.
        fast: whether sums over parts may depend on the number of ranks.
        options: fields of Plan and of Request.

    Raises:
        ConfigError: a name or a value does not fit.
        RunExistsError: ``out`` is not empty.
        CheckpointWriteError: the directory cannot be made.
    """
    file = _loaded(recipe)
    config = configure(file.config_class, values, where=file.name)
    config = settled_paths(config, fields_of(file.config_class))
    refuse_unrecordable(config, where=file.name)
    plan = _plan(options)
    where = find_device(device)
    team = team or Team()
    ranks = settled_ranks(team.ranks, parts=parts, fast=bool(fast))
    return Request(
        recipe=file,
        config=config,
        directory=shared_directory(team, lambda: make_directory(out, file.name)),
        device=where,
        plan=plan,
        ranks=ranks,
        modules=imported_modules(file.source, file.path.resolve().parent),
        **options,
    )


def resume_request(
    directory: Path,
    recipe: str | RecipeFile | None,
    values: Mapping[str, Any],
    *,
    device: str = "auto",
    team: Team | None = None,
    parts: int | None = None,
    fast: bool | None = None,
    **options: Any,
) -> Request:
    """A request to go on with a run.

    Args:
        directory: the run's.
        recipe: the recipe file, if it is to be another than the copy in the run's directory.
        values: Config fields that are to change.
        device: "auto": as before; or a device's name.
        team: the ranks that train together.
        parts: that each batch is cut into: as many as before.
        fast: whether sums over parts may depend on the number of ranks; None: as before.
        options: fields of Plan and of Request.

    Raises:
        ConfigError: there is no such run, or a name or a value does not fit.
    """
    opened = open_directory(directory)
    recorded = read_json(opened.config)
    about = recorded["recipe"]
    origin = Path(native(about["path"]))
    if recipe is None:
        # a start that was killed may have left no copy
        file = load_recipe_file(opened.recipe if opened.recipe.exists() else origin, beside=origin.parent)
        file = attrs.evolve(file, path=origin, name=about["name"])
    else:
        file = _loaded(recipe)
    modules = imported_modules(file.source, file.path.resolve().parent)
    config = configure(file.config_class, {**_known(recorded, file), **values}, where=file.name)
    config = settled_paths(config, values)
    refuse_unrecordable(config, where=file.name)
    changes = [
        *changed_code(about, name=file.path.name, sha256=file.sha256, modules=modules),
        *changed_settings(recorded["config"], to_json(config)),
    ]
    for option, value in recorded.get("watching", {}).items():
        options[option] = options.get(option) or value
    plan = _plan(options)
    was = recorded.get("compile")
    if options.get("compile") is None:
        options["compile"] = was
    elif was is not None and options["compile"] != was:
        changes.append(Change("--compile", was, options["compile"], "compile"))
    before, now = recorded.get("vectorised", False), options.get("vectorised", False)
    if before != now:
        changes.append(Change("vectorised", before, now, "vectorised"))
    init = None if recorded.get("init") is None else InitialWeights.from_json(recorded["init"])
    where = find_device(recorded["device"] if device == "auto" else device)
    ranks, others = recorded_ranks((team or Team()).ranks, recorded, parts=parts, fast=fast)
    changes += others
    return Request(
        recipe=file, config=config, directory=opened, device=where, plan=plan, resume=True, modules=modules,
        recorded=recorded, changes=tuple(changes), init=init, ranks=ranks, **options,
    )  # fmt: skip
