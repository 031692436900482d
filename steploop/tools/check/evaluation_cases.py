"""Cases of the laws of an evaluation: it changes nothing, and does not depend on the batch size."""

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from types import CellType
from typing import Any

import attrs

from steploop.core.state.train_state import TrainState
from steploop.core.steps.evaluation import evaluate
from steploop.testing.partition_laws import (
    check_evaluation_changes_nothing,
    check_evaluation_ignores_partition,
    check_same_metrics,
)
from steploop.testing.state_comparison import members
from steploop.tools.check.batch_structure import first_axis
from steploop.tools.check.cases import Case, NotApplicable, amount, run_of
from steploop.tools.check.one_line import one_line
from steploop.tools.check.subjects import Subject, loaders_of, replaced_loaders, smaller

__all__ = ["evaluation_batch_size", "evaluation_changes"]


def evaluation_changes(s: Subject) -> Iterator[Case]:
    """An evaluation before each step changes nothing."""
    evaluation = _Evaluation(s)

    def check(number: int) -> None:
        loaders = evaluation.loaders if evaluation.takes_few else []
        with replaced_loaders(loaders, partial(smaller, samples=s.samples)):
            check_evaluation_changes_nothing(
                evaluation.measure, s.recipe.state, s.recipe.train_step, s.batches[:number]
            )

    for n in range(1, min(2, len(s.batches)) + 1):
        yield run_of(s, n), partial(check, n)


def evaluation_batch_size(s: Subject) -> Iterator[Case]:
    """Through the evaluation's loaders, else the Config's batch sizes, else the objective by itself."""
    evaluation = _Evaluation(s)
    settings = [name for name, value in s.settings.items() if "batch_size" in name and type(value) is int]
    if evaluation.loaders:
        whole = (
            s.samples - 1 + s.samples % 2
        )  # an odd number, so that every size between has a short last batch
        for size in (-(-whole // 2), -(-whole // 3)):
            yield (
                f"{amount(whole, 'sample')} in batches of {size}",
                partial(evaluation.check_loaders, whole, size),
            )
    elif settings:
        yield f"another {', '.join(settings)}", partial(evaluation.check_settings, settings)
    elif s.recipe.objective is None:
        raise NotApplicable("evaluate holds no Loader, and no setting is named batch_size")
    else:
        yield _objective_alone(s)


class _Evaluation:
    """A recipe's evaluation, and the loaders that it holds."""

    def __init__(self, subject: Subject) -> None:
        if subject.recipe.evaluate is None:
            raise NotApplicable("the Recipe has no evaluate")
        self._subject = subject
        self.measure: Callable[[Any], Any] = subject.recipe.evaluate
        self.loaders: list[CellType] = loaders_of(self.measure)

    @cached_property
    def takes_few(self) -> bool:
        """Whether it can be made on a few samples: some metrics need one of every class."""
        try:
            with replaced_loaders(self.loaders, partial(smaller, samples=self._subject.samples)):
                self.measure(self._subject.recipe.state)
        except Exception:  # noqa: BLE001  (a recipe may raise anything)
            return False
        return True

    def check_loaders(self, whole: int, size: int) -> None:
        """``whole`` samples in one batch, and in batches of ``size``."""
        if not self.takes_few:
            raise NotApplicable(f"evaluate does not take {amount(self._subject.samples, 'sample')}")
        found = []
        for batch_size in (whole, size):
            replace = partial(smaller, samples=whole, batch_size=batch_size)
            with replaced_loaders(self.loaders, replace):
                found.append(self.measure(self._state))
        check_same_metrics(
            found[1], found[0], f"the evaluation must not depend on the batch size ({whole} or {size})"
        )

    def check_settings(self, names: list[str]) -> None:
        """The same evaluation of the recipe built with smaller batch sizes."""
        before = self._subject.settings
        other_sizes = {name: max(before[name] // 2 - 1, 1) for name in names}
        sizes = ", ".join(f"{name}={value}" for name, value in other_sizes.items())
        try:
            other = self._subject.fresh(**other_sizes).evaluate
            found = None if other is None else other(self._state)
        except Exception as error:
            raise NotApplicable(f"with {sizes} it ends with {one_line(error)}") from error
        if found is None:
            raise NotApplicable(f"with {sizes} the Recipe has no evaluate")
        check_same_metrics(found, self.measure(self._state), f"the evaluation must not depend on {sizes}")

    @property
    def _state(self) -> Any:
        return _in_float32(self._subject.recipe.state)


def _objective_alone(s: Subject) -> Case:
    """``steploop.evaluate`` of the objective, on a batch and on its two halves: rests on how samples are cut."""
    structure, state = s.structure, _in_float32(s.recipe.state)
    objective: Any = s.recipe.objective
    if structure.cut is None:
        raise NotApplicable(structure.why)
    if s.recipe.samples_of is not None:
        raise NotApplicable("Recipe.samples_of gives the first samples of a batch, and not the rest of them")
    first, batch = next(iter(members(state).values())), s.batches[0]
    size = first_axis(batch)
    if size < 2:
        raise NotApplicable("a batch has one sample only")
    parts = [size - size // 2, size // 2]

    def check() -> None:
        try:
            check_evaluation_ignores_partition(
                lambda t, xs: evaluate(t, xs, objective),
                first,
                batch,
                parts,
            )
        except Exception as error:
            if structure.certain and isinstance(error, AssertionError):
                raise
            reason = structure.why or "the objective by itself does not take this batch"
            raise NotApplicable(f"{reason}; {one_line(error)}") from error

    return f"the objective, {amount(size, 'sample')} in batches of {parts[0]} and {parts[1]}", check


def _in_float32(state: Any) -> Any:
    """bfloat16 rounds differently in batches of another size; the law is about weights."""
    if isinstance(state, TrainState):
        return attrs.evolve(state, precision="fp32", scale=None)
    return {name: _in_float32(member) for name, member in state.items()}
