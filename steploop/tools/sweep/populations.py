"""Find out which members of a sweep can be one population, and whether that is faster than runs of their own."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from types import ModuleType
from typing import Any

import attrs
import torch

from steploop.compilation.flattening import flatten
from steploop.compilation.population.stacked_state import stack_members
from steploop.compilation.population.stacked_tensors import check_alike
from steploop.core.ambient_generators import ambient_kept, generators_of_all_devices
from steploop.core.steps.trial import trial_evaluations
from steploop.errors import CompileError, ConfigError, EmptyDataError
from steploop.recipe.config_values import configure
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import RecipeFile
from steploop.runs.environment import find_device
from steploop.tools.sweep.member_seats import Seat
from steploop.tools.sweep.sweep_record import Member, SweepRecord
from steploop.tools.sweep.together import Steps

__all__ = ["Built", "Group", "build", "grouped", "renamed", "tried"]

_ROUNDS = 5
_BUDGET_S = 0.2  # for one form in one round


@attrs.frozen(eq=False)
class Built:
    """A member whose recipe is built.

    Attributes:
        member: which.
        recipe: its recipe.
        file: the recipe file.
    """

    member: Member
    recipe: Recipe
    file: RecipeFile

    def file_for(self, seat: Seat) -> RecipeFile:
        """A recipe file that builds this recipe, with a train step that stands still at ``seat``."""
        kept: list[Recipe] = [self.recipe]

        def build(config: Any, device: torch.device) -> Recipe:
            recipe = kept.pop() if kept else self.file.build(config, device)
            seat.own = recipe.train_step
            return attrs.evolve(recipe, train_step=seat.step)

        module = ModuleType(self.file.module.__name__)
        module.__dict__.update(Config=self.file.config_class, build=build)
        return attrs.evolve(self.file, module=module)


@attrs.frozen(eq=False)
class Group:
    """Members whose states have one shape.

    Attributes:
        built: the members.
        steps: of all of them, where they were tried.
        figures: what was measured, in microseconds for a step of one member.
    """

    built: Sequence[Built]
    steps: Steps | None = None
    figures: Mapping[str, Any] = attrs.field(factory=dict)

    @property
    def numbers(self) -> list[int]:
        """Of the members."""
        return [one.member.number for one in self.built]


def build(sweep: SweepRecord, member: Member, file: RecipeFile) -> Built:
    """Build the recipe of a member, from generators as they are now, which stay so.

    Raises:
        ConfigError: it cannot be stepped with others; says why.
        Exception: what the recipe raises.
    """
    config = configure(file.config_class, {**sweep.base, **member.settings}, where=file.name)
    with ambient_kept(generators_of_all_devices()):
        recipe = file.build(config, find_device(sweep.options.get("device") or "auto"))
    if isinstance(recipe.state, Mapping):
        raise ConfigError("its recipe trains several states, and a population is made of single ones")
    if recipe.then is not None:
        raise ConfigError("its recipe has several phases, each with a train step of its own")
    if hasattr(recipe.train_step, "stretch"):
        raise ConfigError("its train step is compiled already: give the recipe the plain function")
    return Built(member, recipe, file)


def first_batch(recipe: Recipe) -> Any:
    """The first batch of a recipe.

    Raises:
        EmptyDataError: there is none.
    """
    with trial_evaluations():  # in which an epoch of a Loader has one batch
        batches = recipe.batches.epoch(0, 0)
        with closing(batches) if hasattr(batches, "close") else nullcontext():  # type: ignore[type-var]  # a generator
            for batch in batches:
                return batch
    raise EmptyDataError("its recipe has no batches")


def grouped(built: Sequence[Built]) -> tuple[list[Group], dict[int, str]]:
    """Members by the shapes of their states and batches, and for those that are alone the reason."""
    groups: list[list[Built]] = []
    apart: dict[int, str] = {}
    forms: dict[int, Any] = {}
    differs: dict[int, str] = {}
    for one in built:
        number = one.member.number
        try:
            forms[number] = flatten(first_batch(one.recipe))[1]
            check_alike([one.recipe.state])
        except Exception as error:  # noqa: BLE001  (data may raise anything, and the run says it)
            apart[number] = f"{type(error).__name__}: {error}"
            continue
        for group in groups:
            first = group[0].member.number
            text = _difference(group[0], one, same_batches=forms[first] == forms[number])
            if text is None:
                group.append(one)
                break
            differs[number] = differs[first] = text
        else:
            groups.append([one])
    for alone in (group[0].member.number for group in groups if len(group) == 1):
        apart[alone] = differs.get(alone, "there is no other member to train it with")
    return [Group(group) for group in groups if len(group) > 1], apart


def _difference(first: Built, other: Built, *, same_batches: bool) -> str | None:
    """What keeps two members from being in one population; None if nothing does."""
    numbers = [first.member.number, other.member.number]
    if not same_batches:
        return f"the batches of {numbers[1]:03d} have another form than those of {numbers[0]:03d}"
    try:
        check_alike([first.recipe.state, other.recipe.state])
    except ConfigError as error:
        return renamed(str(error).removeprefix("stack: "), numbers)
    return None


def renamed(text: str, numbers: Sequence[int]) -> str:
    """An error about a population, with the numbers of the members in the sweep."""
    return re.sub(r"\bmember (\d+)", lambda m: f"member {numbers[int(m[1])]:03d}", text)


def tried(group: Group, *, measure: bool, compiled: Any, jobs: int) -> Group:
    """Take some steps as a population, and measure them; the states of the members stay as they are.

    Args:
        group: the members.
        measure: whether to time it, against single steps.
        compiled: how members on their own would be compiled: True, False or "auto".
        jobs: how many members on their own would run at once.

    Raises:
        CompileError: it cannot be one graph; says why.
    """
    own = [one.recipe.train_step for one in group.built]
    batches = [first_batch(one.recipe) for one in group.built]
    steps, count = Steps(own), len(own)
    with ambient_kept(generators_of_all_devices()):
        # the first step of each makes its optimizer's slots
        states = [
            step(one.recipe.state.clone(), batch)  # type: ignore[union-attr]  # single ones, see ``build``
            for one, step, batch in zip(group.built, own, batches, strict=True)
        ]

        def population_step(population: Any) -> Any:
            views = [population.member(i) for i in range(count)]
            moved = [view.replace(batch=view.batch + 1) for view in views]  # as a run does between two steps
            new = steps.take(population.going_on(moved, [None] * count), batches)
            if new is None:
                raise CompileError(
                    "has batches of another form, or makes optimizer slots, at its second step"
                )
            return new

        forms: dict[str, tuple[Callable[[Any], Any], Any]] = {}
        forms["population"] = population_step, population_step(stack_members(states))
        if not measure:
            return attrs.evolve(group, steps=steps)
        if compiled is not True:
            forms["eager single"] = (lambda state: own[0](state, batches[0])), states[0].clone()
        if compiled is not False:
            from steploop.compilation import compile as compile_step

            one = compile_step(own[0], mode=True)
            forms["compiled single"] = (lambda state: one(state, batches[0])), states[0].clone()
        best = _timed(forms, jobs=jobs)
    figures = {
        name: round(s * 1e6 / (count if name == "population" else jobs), 1) for name, s in best.items()
    }
    return attrs.evolve(group, steps=steps, figures=figures)


def _timed(forms: Mapping[str, tuple[Callable[[Any], Any], Any]], *, jobs: int) -> dict[str, float]:
    """Seconds of the fastest rounds of each form, in turns; single steps share the threads with as many others."""
    best = dict.fromkeys(forms, float("inf"))
    states = {name: state for name, (_, state) in forms.items()}
    most = torch.get_num_threads()
    for _ in range(_ROUNDS):
        for name, (step, _) in forms.items():
            torch.set_num_threads(most if name == "population" else max(1, most // jobs))
            begin, taken, now = time.perf_counter(), 0, 0.0
            while now < _BUDGET_S:
                states[name] = step(states[name])
                _ = float(states[name].loss.sum())  # waits for the device
                taken, now = taken + 1, time.perf_counter() - begin
            best[name] = min(best[name], now / taken)
    torch.set_num_threads(most)
    return best
