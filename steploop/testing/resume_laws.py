"""Laws of whole runs: they can be cut, saved and loaded anywhere, and do not disturb each other."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from steploop.testing.state_comparison import State, Step, clone, copied, fold, require, require_same, values

__all__ = ["check_fold_splits", "check_resume_is_exact", "check_runs_do_not_disturb_each_other"]


def check_fold_splits(step: Step, state: State, batches: Sequence[Any], cut: int) -> None:
    """Law 3. A run equals its first part followed by its second part, at every cut.

        fold(s, a + b) = fold(fold(s, a), b) = fold(clone(fold(s, a)), b)

    Args:
        step: any step.
        state: is left whole.
        batches: a + b.
        cut: the length of a.

    Example:
        >>> check_fold_splits(train_step, state, batches, cut=2)
    """
    whole = copied(values(fold(step, batches, clone(state))))
    half = fold(step, batches[:cut], clone(state))
    kept, half_values = clone(half), copied(values(half))
    require_same(
        fold(step, batches[cut:], half),
        whole,
        f"a run cut after {cut} batches must equal the uninterrupted run",
    )
    require_same(kept, half_values, "a clone must not change when its original is trained")
    require_same(
        fold(step, batches[cut:], kept),
        whole,
        f"a clone made after {cut} batches must train like the original",
    )


def check_runs_do_not_disturb_each_other(
    step: Step, one: State, other: State, batches: Sequence[Any]
) -> None:
    """Two runs that take turns, even over one model, do not disturb each other.

    With s and t the two states, stepped in turn:      s_n = fold(s, xs),   t_n = fold(t, xs)

    Args:
        step: any step.
        one: is left whole.
        other: is left whole; a clone of ``one`` shares its machines.
        batches: of each of the runs.

    Example:
        >>> check_runs_do_not_disturb_each_other(train_step, state, state, batches)
    """
    alone = [copied(values(fold(step, batches, clone(s)))) for s in (one, other)]
    s, t = clone(one), clone(other)
    for batch in batches:
        s, t = step(s, batch), step(t, batch)
    require_same(s, alone[0], "a run must not be disturbed by another that takes turns with it")
    require_same(t, alone[1], "the other run must not be disturbed either")


def check_resume_is_exact(
    step: Step,
    state: State,
    batches: Sequence[Any],
    cut: int,
    like: State,
    *,
    save: Callable[[State, Path], Any] | None = None,
    load: Callable[[Path, State], State] | None = None,
    resumed_step: Step | None = None,
) -> None:
    """Law 4. A run that is saved, loaded and continued equals the uninterrupted run, bit for bit.

        fold(load(save(fold(s, a))), b) = fold(s, a + b)

    Args:
        step: any step.
        state: is left whole.
        batches: a + b.
        cut: the length of a.
        like: a first state of the same recipe, which the checkpoint is loaded into; of other values, best of all.
        save: ``(state, folder)``; ``steploop.checkpoint.save`` unless given.
        load: ``(folder, like) -> state``; ``steploop.checkpoint.load`` unless given.
        resumed_step: the step to go on with: made anew, in it nothing remains of the first part; else ``step``.

    Example:
        >>> check_resume_is_exact(train_step, state, batches, cut=2, like=state)
    """
    save, load = save or _save, load or _load
    whole = copied(values(fold(step, batches, clone(state))))
    half = fold(step, batches[:cut], clone(state))
    with TemporaryDirectory() as folder:
        place = Path(folder) / "checkpoint"
        save(half, place)
        loaded = load(place, like)
    require_same(loaded, half, f"loading must give what was saved after {cut} batches")
    require(loaded is not half, "loading must give a new state")
    result = fold(resumed_step or step, batches[cut:], loaded)
    require_same(
        result, whole, f"a run saved and loaded after {cut} batches must equal the uninterrupted run"
    )


def _save(state: State, folder: Path) -> None:
    from steploop.checkpoint import save

    save(state, folder, require_finite=False)  # whether the numbers are good is another law's affair


def _load(folder: Path, like: State) -> State:
    from steploop.checkpoint import load

    return load(folder, like=like)
