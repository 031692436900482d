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

from steploop.core.trees import map_tensors
from steploop.data.accepted import is_tensors
from steploop.data.loader import Loader
from steploop.errors import ConfigError, EmptyDataError
from steploop.recipe.config_values import configure
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import load_recipe_file
from steploop.runs.monitoring import prepared
from steploop.testing.state_comparison import copied
from steploop.tools.check.batch_structure import Structure, first_samples, structure_of

__all__ = ["Subject", "loaders_of", "replaced_loaders", "smaller"]


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
        whole: whether batches are used uncut; None: found out from the first one.
    """

    path: Path
    values: dict[str, Any]
    device: torch.device
    phase: int = 0
    samples: int = 8
    steps: int = 3
    whole: bool | None = None

    def fresh(self, **changes: Any) -> Recipe:
        """Build the recipe as a new process would: its file run again, and the state that a run starts from.

        Args:
            changes: settings besides ``values``.
        """
        file = load_recipe_file(self.path)
        config = configure(file.config_class, {**self.values, **changes}, where=file.name)
        recipe = file.build(config, self.device)
        recipe = attrs.evolve(recipe, state=prepared(recipe, recipe.state))
        for _ in range(self.phase):
            if recipe.then is None:
                raise ConfigError(f"The recipe {file.name} has no phase {self.phase}.")
            recipe = recipe.then(recipe.state)
            recipe = attrs.evolve(recipe, state=prepared(recipe, recipe.state))
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
        """The first batches of the first epoch, cut to ``samples`` where it is known how."""
        return self._cut(copied(self._first))

    def batches_of(self, recipe: Recipe, start: int = 0) -> list[Any]:
        """Return the first batches of another build of the recipe, from ``start`` on."""
        return self._cut(self._uncut(recipe, start))

    @cached_property
    def structure(self) -> Structure:
        """How a batch is cut into samples; found out once."""
        if self.whole is not None:
            return Structure(
                cut=None if self.whole else self.recipe.samples_of or first_samples, certain=False
            )
        return structure_of(self.recipe, self._first[0], self.samples, self.fresh)

    @cached_property
    def _first(self) -> list[Any]:
        return self._uncut(self.recipe)

    def _uncut(self, recipe: Recipe, start: int = 0) -> list[Any]:
        iterator = iter(recipe.batches.epoch(0, start))
        found = [copied(batch) for batch in islice(iterator, self.steps - start)]
        if callable(close := getattr(iterator, "close", None)):
            close()
        if not found and not start:
            raise EmptyDataError("check: the recipe's batches are empty: there is nothing to check it with.")
        return found

    def _cut(self, batches: list[Any]) -> list[Any]:
        cut = self.structure.cut
        return batches if cut is None else [cut(batch, self.samples) for batch in batches]


def smaller(loader: Loader, samples: int, *, batch_size: int | None = None, num_workers: int = 0) -> Loader:
    """Limit a loader to its first ``samples`` samples, by default read in this process."""
    data = loader.dataset
    if is_tensors(data):
        data = map_tensors(lambda t: t[:samples], data)
    else:
        data = Subset(data, range(min(samples, loader.num_samples)))
    size = min(batch_size or loader.batch_size, samples, loader.num_samples)
    return attrs.evolve(
        loader,
        dataset=data,
        batch_size=size,
        order=None,
        num_workers=num_workers,
        persistent_workers=False,
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
