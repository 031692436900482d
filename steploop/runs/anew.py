"""Apply what a resume is given anew to the state that was loaded."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from steploop.core.ambient_generators import ambient_kept, generators_of_all_devices
from steploop.core.early_stopping import StoppingState
from steploop.core.plateau import PlateauState
from steploop.core.state.several import State, members
from steploop.core.state.train_state import TrainState
from steploop.data.batches import epoch_of_parts
from steploop.errors import ConfigError, NonFiniteError, SteploopError
from steploop.recipe.recipe import Recipe
from steploop.runs.contract import as_json
from steploop.runs.members import arranged, lead, with_lead

__all__ = ["with_folds", "with_hyperparameters", "with_loss_scales"]

Note = Callable[[str], None]
_Hyper = tuple[Mapping[str, Any], ...]


def with_folds(recipe: Recipe, state: State, before: Mapping[str, Any], note: Note) -> State:
    """The state with best, early stopping and plateau as the recipe wants them now.

    Args:
        recipe: as it is now.
        state: as it was loaded.
        before: the phase's record; empty for a run of version 0.1.0.
        note: gets a sentence for each change.
    """
    first = lead(state)
    changes: dict[str, Any] = {}
    monitored = before.get("monitor")
    if monitored is not None and monitored != [recipe.monitor, recipe.mode]:
        changes["best"] = None
        note(
            f"monitors {recipe.monitor} ({recipe.mode}) instead of {monitored[0]} ({monitored[1]}): no best so far"
        )
    changes["early_stopping"] = _stopping(recipe, first.early_stopping, before, note)
    changes["plateau"] = _plateau(recipe, first.plateau, before, note)
    return with_lead(state, **changes)


def _stopping(
    recipe: Recipe, fold: StoppingState | None, before: Mapping[str, Any], note: Note
) -> StoppingState | None:
    rule = recipe.early_stopping
    if rule is None:
        return None
    recorded = before.get("early_stopping")
    if fold is None or (recorded is not None and recorded != [rule.monitor, rule.mode]):
        return rule.init()
    if fold.stopped and fold.bad_checks < rule.patience:
        note(
            f"early stopping ended this run after {fold.bad_checks} evaluations without improvement; its patience is "
            f"{rule.patience} now, so that the run goes on"
        )
        return attrs.evolve(fold, stopped=False)
    return fold


def _plateau(
    recipe: Recipe, fold: PlateauState | None, before: Mapping[str, Any], note: Note
) -> PlateauState | None:
    rule = recipe.plateau
    if rule is None:
        return None
    if fold is None:
        return rule.init()
    recorded = before.get("plateau")
    if recorded is not None and recorded[0] != rule.lr:
        # as often lowered as before, from the new rate
        rate = fold.learning_rate * (rule.lr / recorded[0]) if recorded[0] else rule.lr
        fold = attrs.evolve(fold, learning_rate=max(rate, rule.min_lr))
        note(
            f"plateau: the rate begins at {rule.lr} instead of {recorded[0]}, which makes it {fold.learning_rate:g} now"
        )
    if recorded is not None and (
        recorded[1] != rule.mode or before.get("monitor") != [recipe.monitor, recipe.mode]
    ):
        fold = attrs.evolve(fold, best=None, bad_checks=0)
    return fold


def with_loss_scales(recipe: Recipe, state: State, before: Mapping[str, Any], note: Note) -> State:
    """The state with those values of its loss scale that the recipe gives anew."""
    changed = {}
    for name, one in members(state).items():
        fresh, old = members(recipe.state)[name].scale, before.get(name, {}).get("scale")
        if one.scale is None or fresh is None or old is None:
            continue
        values = {
            key: value for key, value in attrs.asdict(fresh).items() if old.get(key, value) != as_json(value)
        }
        if values:
            note(f"loss scale: {', '.join(f'{key} {old[key]} -> {value}' for key, value in values.items())}")
            changed[name] = one.replace(scale=attrs.evolve(one.scale, **values))
    return _replaced(state, changed)


def with_hyperparameters(
    recipe: Recipe, load: Callable[[], State], before: Mapping[str, Any], now: Mapping[str, Any], note: Note
) -> State:
    """The state with the learning rate, weight decay, momentum and betas that the recipe gives it now.

    What the train step sets (by ``schedule``) is what it sets after the run's last step, with its schedule of now: one
    step is taken for it on a state that is thrown away. Other values that the recipe's first state has otherwise than
    the run's first state had are taken from the recipe.

    Args:
        recipe: as it is now.
        load: gives the loaded state, as often as it is called.
        before: "start" of the phase's record; empty for a run whose first values are not known.
        now: the same of the recipe as it is now.
        note: gets a sentence for each change.

    Raises:
        ConfigError: a hyperparameter cannot change in the middle of training, or no step can be taken.
    """
    state = load()
    untrained = all(one.attempted_steps == 0 for one in members(state).values())
    by_step = {} if untrained else _set_by_step(recipe, load)
    changed = {}
    for name, one in members(state).items():
        fresh = members(recipe.state)[name].hyper
        old = before.get(name, now[name])["hyper"]
        if len(old) != len(fresh):  # a record of other groups
            old = now[name]["hyper"]
        given = [
            {k: fresh[n][k] for k in group if k in fresh[n] and old[n].get(k) != now[name]["hyper"][n].get(k)}
            for n, group in enumerate(one.hyper)
        ]
        for values, group in zip(given, one.hyper, strict=True):
            _refuse_structural(values, group)
        set_ = by_step.get(name, [{}] * len(given))
        groups = tuple({**g, **new, **by} for g, new, by in zip(one.hyper, given, set_, strict=True))
        said = _differences(one.hyper, groups)
        if said:
            note(f"{name}: {said}" if name else said)
            changed[name] = one.replace(hyper=groups)
    return _replaced(state, changed)


def _refuse_structural(values: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Numbers may change between two steps; switches decide what an optimizer keeps for its parameters."""
    for key, value in values.items():
        for side in (value, group[key]):
            parts = side if isinstance(side, (tuple, list)) else [side]
            if any(isinstance(part, (bool, str)) or part is None for part in parts):
                raise ConfigError(
                    f"{key} cannot change in the middle of training: it is {group[key]!r} in the checkpoint, and {value!r} is "
                    "given. Leave it as it was, or begin a new run from the weights: steploop run RECIPE --init RUN."
                )


def _differences(before: _Hyper, now: _Hyper) -> str:
    pairs = [(k, as_json(g[k]), as_json(h[k])) for g, h in zip(before, now, strict=True) for k in g]
    return ", ".join(dict.fromkeys(f"{key} {old} -> {new}" for key, old, new in pairs if old != new))


def _replaced(state: State, changed: Mapping[str, TrainState]) -> State:
    if isinstance(state, TrainState):
        return changed.get("", state)
    return {name: changed.get(name, one) for name, one in state.items()}


def _set_by_step(recipe: Recipe, load: Callable[[], State]) -> dict[str, list[dict[str, Any]]]:
    """Which hyperparameters a train step sets, and to what after as many steps as the run has taken.

    A value that the step leaves alone is recognised by a mark: it goes in a little changed, and comes out so.
    """
    back = dict.fromkeys(members(recipe.state), (1, 1))
    for _ in range(2):
        before = {name: _marked(one, *back[name]) for name, one in members(load()).items()}
        after = _after_a_step(recipe, before)
        taken = {
            n: (after[n].step - one.step, after[n].attempted_steps - one.attempted_steps)
            for n, one in before.items()
        }
        if taken == back:
            break
        back = taken  # a step that is not finite counts for none, and a generator may take several
    return {
        name: [
            {key: value for key, value in now.items() if key in was and as_json(value) != as_json(was[key])}
            for was, now in zip(before[name].hyper, after[name].hyper, strict=True)
        ]
        for name in before
    }


def _after_a_step(recipe: Recipe, states: Mapping[str, TrainState]) -> dict[str, TrainState]:
    given: State = states if isinstance(recipe.state, Mapping) else states[""]
    batches = epoch_of_parts(recipe.batches, lead(given).ranks, lead(given).epoch, 0)
    try:
        with ambient_kept(generators_of_all_devices()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return members(arranged(recipe.train_step(given, next(iter(batches))), tuple(states)))
    except NonFiniteError:
        return dict(states)
    except SteploopError:
        raise
    except Exception as error:
        raise ConfigError(
            f"With what this resume is given, no step can be taken from the checkpoint: {type(error).__name__}: {error}. "
            "Leave it as it was, or begin a new run from the weights: steploop run RECIPE --init RUN."
        ) from error
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()


def _marked(state: TrainState, applied: int, attempted: int) -> TrainState:
    """The state before so many steps, its hyperparameters marked."""
    return state.replace(
        hyper=tuple({key: _mark(value) for key, value in group.items()} for group in state.hyper),
        applied_steps=max(state.step - applied, 0),
        attempted_steps=max(state.attempted_steps - attempted, 0),
    )


def _mark(value: Any) -> Any:
    if isinstance(value, tuple) and value:
        return (_mark(value[0]), *value[1:])
    if isinstance(value, (float, torch.Tensor)) and not isinstance(value, bool):
        return value * (1 - 2.0**-12) if value else 2.0**-40
    return value
