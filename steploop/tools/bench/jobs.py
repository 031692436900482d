"""Describe what is measured: a recipe and its settings, passed to a worker as JSON."""

import json
from pathlib import Path
from typing import Any

import attrs
import torch

from steploop.recipe.config_values import configure, split_assignments
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import load_recipe_file
from steploop.runs.environment import find_device
from steploop.runs.monitoring import prepared

__all__ = ["CASES", "CONTENDERS", "RANK_CONTENDERS", "Job"]

HANDWRITTEN = "hand-written"
COMPILED_MODEL = "torch.compile(model)"
EAGER = "steploop"
COMPILED = "steploop compiled"
COMPILING = (COMPILED_MODEL, COMPILED)
CONTENDERS = (HANDWRITTEN, COMPILED_MODEL, EAGER, COMPILED)
DDP = "DistributedDataParallel"
EXACT = "steploop exact"
FAST = "steploop fast"
RANK_CONTENDERS = (DDP, EXACT, FAST)

# The yardsticks that come with the package: recipes with nothing to learn, by name.
CASES = {name: Path(__file__).parent / "cases" / f"{name}.py" for name in ("overhead", "smallcnn")}


@attrs.frozen(kw_only=True)
class Job:
    """A recipe to measure.

    Attributes:
        recipe: its file.
        overrides: ``name=value`` for fields of its Config.
        device: as on the command line.
        batches: how many of its batches are kept in memory and cycled through.
        nproc: processes of each contender, each with its part of every batch.
        tune: whether to let glibc keep freed memory, as ``steploop run`` does.
    """

    recipe: Path
    overrides: tuple[str, ...] = ()
    device: str = "auto"
    batches: int = 16
    nproc: int = 1
    tune: bool = True

    def build(self) -> tuple[Recipe, torch.device]:
        """Load the file and build the recipe, with the state that a run starts from."""
        file = load_recipe_file(self.recipe)
        config = configure(file.config_class, split_assignments(list(self.overrides)), where=file.name)
        device = find_device(self.device)
        recipe = file.build(config, device)
        return attrs.evolve(recipe, state=prepared(recipe, recipe.state)), device

    def to_json(self) -> str:
        """Write the job as one line of JSON."""
        return json.dumps({**attrs.asdict(self), "recipe": str(self.recipe)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read a job that ``to_json`` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "recipe": Path(fields["recipe"]), "overrides": tuple(fields["overrides"])})
