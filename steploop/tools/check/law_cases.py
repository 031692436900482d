"""List the laws that apply to a recipe, with the cases to try, the smallest first."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs

from steploop.core.state.train_state import TrainState
from steploop.core.steps.evaluation import evaluate
from steploop.core.trees import count_samples
from steploop.data.batch_requests import is_tensors
from steploop.data.loader import Loader
from steploop.recipe.recipe import Recipe
from steploop.testing.clipping_laws import check_a_batch_of_nan_changes_nothing
from steploop.testing.determinism_laws import check_operations_are_deterministic
from steploop.testing.objective_laws import (
    check_every_parameter_is_reached,
    check_one_batch_is_learned,
    check_step_lowers_the_loss,
)
from steploop.testing.order_laws import (
    check_batches_do_not_depend_on_workers,
    check_cursor_continues_the_epoch,
)
from steploop.testing.partition_laws import (
    check_evaluation_changes_nothing,
    check_evaluation_ignores_partition,
    check_same_metrics,
)
from steploop.testing.purity_laws import (
    SURROUNDINGS,
    check_input_stays_whole,
    check_same_input_same_result,
    check_surroundings,
    pure,
)
from steploop.testing.resume_laws import check_fold_splits, check_runs_do_not_disturb_each_other
from steploop.testing.state_comparison import members
from steploop.tools.check.resume_process import check_resume
from steploop.tools.check.subjects import Subject, first_samples, loaders_of, replaced_loaders, smaller

__all__ = ["LAWS", "Case", "Law", "NotApplicable"]

# A case: what it is, in words, and the check itself.
Case = tuple[str, Callable[[], None]]


class NotApplicable(Exception):  # noqa: N818  (no error: the law has nothing to say about this recipe)
    """Says why a law does not apply to a recipe."""


@attrs.frozen
class Law:
    """A law and its cases for a recipe, the smallest first."""

    name: str
    cases: Callable[[Subject], Iterator[Case]]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def _run(subject: Subject, number: int) -> str:
    return f"{_count(number, 'batch')} of {_count(count_samples(subject.batches[0]) or 0, 'sample')}"


def _pure_step(s: Subject) -> Iterator[Case]:
    step, state = s.recipe.train_step, s.recipe.state
    yield _run(s, 1), partial(check_input_stays_whole, pure(step), state, s.batches[0])
    for n in range(1, len(s.batches) + 1):
        yield _run(s, n), partial(check_same_input_same_result, step, state, s.batches[:n])


def _surroundings(s: Subject) -> Iterator[Case]:
    batches = [s.batches[0], s.batches[-1]]
    # a step may prepare its batch by itself, and nobody can train on tensors that were made in inference mode
    for name in (name for name in SURROUNDINGS if name != "torch.inference_mode()"):
        yield (
            f"{_run(s, 2)}, {name}",
            partial(check_surroundings, s.recipe.train_step, s.recipe.state, batches, name),
        )


def _folds(s: Subject) -> Iterator[Case]:
    step, state = s.recipe.train_step, s.recipe.state
    for n in range(1, len(s.batches) + 1):
        for cut in range(n + 1):
            yield (
                f"{_run(s, n)}, cut after {cut}",
                partial(check_fold_splits, step, state, s.batches[:n], cut),
            )
    yield (
        f"{_run(s, 2)}, two runs in turn",
        partial(check_runs_do_not_disturb_each_other, step, state, state, s.batches[:2]),
    )


def _resume(s: Subject) -> Iterator[Case]:
    for cut in range(1, len(s.batches)):
        yield f"{_run(s, len(s.batches))}, saved after {cut}", partial(check_resume, s, cut)


def _nan(s: Subject) -> Iterator[Case]:
    state = s.recipe.state
    if not isinstance(state, TrainState):
        raise NotApplicable("several states: one of them may be finite while another is not")
    yield _run(s, 1), partial(check_a_batch_of_nan_changes_nothing, s.recipe.train_step, state, s.batches[0])


def _reached(s: Subject) -> Iterator[Case]:
    yield (
        _run(s, len(s.batches)),
        partial(check_every_parameter_is_reached, s.recipe.train_step, s.recipe.state, s.batches),
    )


def _learned(s: Subject) -> Iterator[Case]:
    if s.recipe.objective is None:
        raise NotApplicable("the Recipe names no objective")
    state = next(iter(members(s.recipe.state).values()))
    if isinstance(s.recipe.state, TrainState):
        yield (
            f"{_run(s, 1)}, train_step",
            partial(check_step_lowers_the_loss, s.recipe.train_step, state, s.batches[0]),
        )
    yield f"{_run(s, 1)}, Adam", partial(check_one_batch_is_learned, s.recipe.objective, state, s.batches[0])


def _evaluation_changes(s: Subject) -> Iterator[Case]:
    measure = _evaluation(s.recipe)
    loaders = loaders_of(measure)

    def check(number: int) -> None:
        with replaced_loaders(loaders, partial(smaller, samples=s.samples)):
            check_evaluation_changes_nothing(measure, s.recipe.state, s.recipe.train_step, s.batches[:number])

    for n in range(1, min(2, len(s.batches)) + 1):
        yield _run(s, n), partial(check, n)


def _evaluation(recipe: Recipe) -> Callable[[Any], Any]:
    if recipe.evaluate is None:
        raise NotApplicable("the Recipe has no evaluate")
    return recipe.evaluate


def _in_float32(state: Any) -> Any:
    """Return the states in fp32: bfloat16 rounds differently in batches of another size."""
    if isinstance(state, TrainState):
        return attrs.evolve(state, precision="fp32", scale=None)
    return {name: _in_float32(member) for name, member in state.items()}


def _evaluation_batch_size(s: Subject) -> Iterator[Case]:
    """Evaluate with other batch sizes: through loaders, the Config, or the objective alone."""
    whole = s.samples - 1 + s.samples % 2  # an odd number, so that every size between has a short last batch
    state = _in_float32(s.recipe.state)
    measure = _evaluation(s.recipe)
    loaders = loaders_of(measure)
    sizes = [-(-whole // 2), -(-whole // 3)]
    settings = [name for name, value in s.settings.items() if "batch_size" in name and type(value) is int]

    def through_loaders(size: int) -> None:
        found = []
        for batch_size in (whole, size):
            with replaced_loaders(loaders, partial(smaller, samples=whole, batch_size=batch_size)):
                found.append(measure(state))
        check_same_metrics(
            found[1], found[0], f"the evaluation must not depend on the batch size ({whole} or {size})"
        )

    def through_config() -> None:
        smaller_sizes = {name: max(s.settings[name] // 2 - 1, 1) for name in settings}
        other = _evaluation(s.fresh(**smaller_sizes))
        law = f"the evaluation must not depend on {', '.join(f'{n}={v}' for n, v in smaller_sizes.items())}"
        check_same_metrics(other(state), measure(state), law)

    if loaders:
        for size in sizes:
            yield f"{_count(whole, 'sample')} in batches of {size}", partial(through_loaders, size)
    elif settings:
        yield f"another {', '.join(settings)}", through_config
    elif s.recipe.objective is None:
        raise NotApplicable("evaluate holds no Loader, and no setting is named batch_size")
    if s.recipe.objective is not None:
        batch, objective = first_samples(s.batches[0], whole), s.recipe.objective
        size = count_samples(batch) or 0
        first = next(iter(members(state).values()))
        if size > 1:
            parts = [size - size // 2, size // 2]
            yield (
                f"the objective, {_count(size, 'sample')} in batches of {parts[0]} and {parts[1]}",
                partial(
                    check_evaluation_ignores_partition,
                    lambda t, xs: evaluate(t, xs, objective),
                    first,
                    batch,
                    parts,
                ),
            )


def _data_order(s: Subject) -> Iterator[Case]:
    for cut in range(len(s.batches)):
        yield (
            f"epoch 0 from batch {cut} on",
            partial(check_cursor_continues_the_epoch, s.recipe.batches, 0, cut, limit=len(s.batches)),
        )


def _workers(s: Subject) -> Iterator[Case]:
    batches = s.recipe.batches
    names = [name for name, value in s.settings.items() if "workers" in name and type(value) is int]
    make: Callable[[int], Any]
    if isinstance(batches, Loader):
        if is_tensors(batches.dataset) and batches.transform is None and batches.collate is None:
            raise NotApplicable("the data are tensors, and nothing is done to single samples")
        count = min(s.samples, batches.batch_size)

        def make(number: int) -> Loader:
            return smaller(batches, count * 2, batch_size=count, num_workers=number)

    elif names:

        def make(number: int) -> Any:
            return s.fresh(**dict.fromkeys(names, number)).batches

    else:
        raise NotApplicable("the batches are no Loader, and no setting is named workers")
    for number in (1, 2):
        for epoch in (0, 1):
            yield (
                f"epoch {epoch}, {_count(number, 'worker')}",
                partial(
                    check_batches_do_not_depend_on_workers,
                    make,
                    workers=(0, number),
                    epochs=(epoch,),
                    limit=s.steps,
                ),
            )


def _deterministic(s: Subject) -> Iterator[Case]:
    yield (
        _run(s, 1),
        partial(check_operations_are_deterministic, s.recipe.train_step, s.recipe.state, s.batches[0]),
    )


LAWS = (
    Law("the step is a pure function of (state, batch)", _pure_step),
    Law("no surrounding of the call matters", _surroundings),
    Law("a run can be cut anywhere", _folds),
    Law("a resume in a new process is exact", _resume),
    Law("a batch of nan changes nothing", _nan),
    Law("every parameter gets a gradient", _reached),
    Law("one batch can be learned by heart", _learned),
    Law("an evaluation changes nothing", _evaluation_changes),
    Law("an evaluation does not depend on the batch size", _evaluation_batch_size),
    Law("the batches are a function of (epoch, position)", _data_order),
    Law("the batches do not depend on the workers", _workers),
    Law("every operation is deterministic", _deterministic),
)
