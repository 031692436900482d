"""Build a recipe for the laws, as often as they need it, with a few small batches."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import CellType
from typing import Any

import attrs
import torch
from torch.utils.data import Subset

from steploop.core.trees import count_samples, map_tensors
from steploop.data.batch_requests import is_tensors
from steploop.data.loader import Loader
from steploop.errors import ConfigError
from steploop.recipe.config_values import configure
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import load_recipe_file
from steploop.testing.state_comparison import copied

__all__ = ["Subject", "first_samples", "loaders_of", "replaced_loaders", "smaller"]


@attrs.frozen(kw_only=True, slots=False)
class Subject:
    """A recipe that is tested.

    Attributes:
        path: the recipe's file.
        values: the settings from the command line, by the name of the field of Config.
        device: where it computes.
        phase: 0 for the recipe itself, 1 for what follows it (``Recipe.then``), and so on.
        samples: how many samples of a batch are used.
        steps: how many batches are used.
    """

    path: Path
    values: dict[str, Any]
    device: torch.device
    phase: int = 0
    samples: int = 8
    steps: int = 3

    def fresh(self, **changes: Any) -> Recipe:
        """Run the recipe's file again, so that its globals are new, and build it.

        Args:
            changes: settings besides ``values``.
        """
        file = load_recipe_file(self.path)
        config = configure(file.config_class, {**self.values, **changes}, where=file.name)
        recipe = file.build(config, self.device)
        for _ in range(self.phase):
            if recipe.then is None:
                raise ConfigError(f"The recipe {file.name} has no phase {self.phase}.")
            recipe = recipe.then(recipe.state)
        return recipe

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Field -> value of the recipe's Config."""
        file = load_recipe_file(self.path)
        config = configure(file.config_class, self.values, where=file.name)
        return {f.name: getattr(config, f.name) for f in attrs.fields(type(config))}

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, for the laws that do not change it."""
        return self.fresh()

    @cached_property
    def batches(self) -> list[Any]:
        """The first batches of the first epoch, cut to ``samples``."""
        return self.batches_of(self.recipe)

    def batches_of(self, recipe: Recipe, start: int = 0) -> list[Any]:
        """Return the first batches of another build of the recipe, from ``start`` on."""
        iterator = iter(recipe.batches.epoch(0, start))
        found = [first_samples(copied(b), self.samples) for b in islice(iterator, self.steps - start)]
        if callable(close := getattr(iterator, "close", None)):
            close()
        return found


def first_samples(batch: Any, count: int) -> Any:
    """Cut a batch to its first ``count`` samples, in every tensor that is as long as the batch."""
    whole = count_samples(batch)
    return map_tensors(lambda t: t[:count] if t.dim() and t.shape[0] == whole else t, batch)


def smaller(loader: Loader, samples: int, *, batch_size: int | None = None, num_workers: int = 0) -> Loader:
    """Limit a loader to its first ``samples`` samples, by default read in this process."""
    data = loader.dataset
    if is_tensors(data):
        data = map_tensors(lambda t: t[:samples], data)
    else:
        data = Subset(data, range(min(samples, loader.num_samples)))
    size = min(batch_size or loader.batch_size, samples, loader.num_samples)
    return attrs.evolve(
        loader, dataset=data, batch_size=size, num_workers=num_workers, persistent_workers=False
    )


def loaders_of(function: Any) -> list[CellType]:
    """Find the closure cells in which a function, or one that it calls, holds a Loader."""
    return list({id(cell): cell for cell in _cells(function, set())}.values())


def _cells(function: Any, seen: set[int]) -> Iterator[CellType]:
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield from _cells(part, seen)
        return
    for cell in getattr(function, "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a variable that was never set
            continue
        if isinstance(value, Loader):
            yield cell
        elif callable(value):
            yield from _cells(value, seen)


@contextmanager
def replaced_loaders(cells: Sequence[CellType], replace: Callable[[Loader], Loader]) -> Iterator[None]:
    """Replace the loader in each cell for the length of the block."""
    before = [cell.cell_contents for cell in cells]
    try:
        for cell, loader in zip(cells, before, strict=True):
            cell.cell_contents = replace(loader)
        yield
    finally:
        for cell, loader in zip(cells, before, strict=True):
            cell.cell_contents = loader
