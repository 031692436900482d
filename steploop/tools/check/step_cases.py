"""Cases of the laws of a step and of a run: purity, surroundings, cuts, resume, nan, gradients, learning, determinism."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from steploop.core.state.train_state import TrainState
from steploop.core.trees import named_leaves
from steploop.testing.clipping_laws import check_a_batch_of_nan_changes_nothing
from steploop.testing.determinism_laws import check_operations_are_deterministic
from steploop.testing.objective_laws import (
    check_every_parameter_is_reached,
    check_one_batch_is_learned,
    check_step_lowers_the_loss,
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
from steploop.tools.check.cases import Case, NotApplicable, run_of
from steploop.tools.check.one_line import one_line
from steploop.tools.check.resume_process import check_resume
from steploop.tools.check.subjects import Subject

__all__ = ["deterministic", "folds", "learned", "nan", "pure_step", "reached", "resume", "surroundings"]


def pure_step(s: Subject) -> Iterator[Case]:
    """The step leaves its input whole, and gives the same again."""
    step, state = s.recipe.train_step, s.recipe.state
    yield run_of(s, 1), partial(check_input_stays_whole, pure(step), state, s.batches[0])
    for n in range(1, len(s.batches) + 1):
        yield run_of(s, n), partial(check_same_input_same_result, step, state, s.batches[:n])


def surroundings(s: Subject) -> Iterator[Case]:
    """What the caller left switched on plays no part."""
    batches = [s.batches[0], s.batches[-1]]
    # a step may prepare its batch by itself, and tensors made in inference mode cannot be trained on
    for name in (name for name in SURROUNDINGS if name != "torch.inference_mode()"):
        yield (
            f"{run_of(s, 2)}, {name}",
            partial(check_surroundings, s.recipe.train_step, s.recipe.state, batches, name),
        )


def folds(s: Subject) -> Iterator[Case]:
    """A run can be cut, and run in turn with another."""
    step, state = s.recipe.train_step, s.recipe.state
    for n in range(1, len(s.batches) + 1):
        for cut in range(n + 1):
            yield (
                f"{run_of(s, n)}, cut after {cut}",
                partial(check_fold_splits, step, state, s.batches[:n], cut),
            )
    yield (
        f"{run_of(s, 2)}, two runs in turn",
        partial(check_runs_do_not_disturb_each_other, step, state, state, s.batches[:2]),
    )


def resume(s: Subject) -> Iterator[Case]:
    """A new process goes on from a checkpoint."""
    if len(s.batches) < 2:
        raise NotApplicable("an epoch has one batch only: there is nothing to go on with")
    for cut in range(1, len(s.batches)):
        yield f"{run_of(s, len(s.batches))}, saved after {cut}", partial(check_resume, s, cut)


def nan(s: Subject) -> Iterator[Case]:
    """A batch of nan is counted and changes nothing."""
    state = s.recipe.state
    if not isinstance(state, TrainState):
        raise NotApplicable("several states: one of them may be finite while another is not")
    leaves = [leaf for _, leaf in named_leaves(s.batches[0]) if isinstance(leaf, Tensor)]
    if not any(t.is_floating_point() and not t.is_sparse and not t.is_nested for t in leaves):
        raise NotApplicable("the batch holds no dense floating-point tensor that could be nan")
    yield (
        run_of(s, 1),
        partial(check_a_batch_of_nan_changes_nothing, s.recipe.train_step, state, s.batches[0]),
    )


def reached(s: Subject) -> Iterator[Case]:
    """Every parameter gets a gradient."""
    yield (
        run_of(s, len(s.batches)),
        partial(check_every_parameter_is_reached, s.recipe.train_step, s.recipe.state, s.batches),
    )


def learned(s: Subject) -> Iterator[Case]:
    """One batch can be learned by heart, by the recipe's own step and by Adam on its objective."""
    objective, batch = s.recipe.objective, s.batches[0]
    if objective is None:
        raise NotApplicable("the Recipe names no objective")
    state = next(iter(members(s.recipe.state).values()))
    if isinstance(s.recipe.state, TrainState):
        check = partial(check_step_lowers_the_loss, s.recipe.train_step, state, batch)
        yield f"{run_of(s, 1)}, train_step", check
    by_adam = partial(check_one_batch_is_learned, objective, state, batch)
    yield f"{run_of(s, 1)}, Adam", _ours(by_adam, "the objective by itself, on this batch and with Adam")


def deterministic(s: Subject) -> Iterator[Case]:
    """The step uses no operation that torch knows to differ from call to call."""
    yield (
        run_of(s, 1),
        partial(check_operations_are_deterministic, s.recipe.train_step, s.recipe.state, s.batches[0]),
    )


def _ours(check: Callable[[], None], what: str) -> Callable[[], None]:
    """A check that combines the recipe's parts in a way of our own: where they do not go together, it does not apply."""

    def run() -> None:
        try:
            check()
        except AssertionError:
            raise
        except Exception as error:
            raise NotApplicable(f"{what}, ends with {one_line(error)}") from error

    return run
