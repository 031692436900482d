"""Repeat the step of a capsule and find where its first non-finite value came from."""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from steploop import checkpoint
from steploop.core.ranks import Ranks
from steploop.core.state.several import State, members
from steploop.core.state.train_state import TrainState
from steploop.core.state.with_ranks import with_ranks
from steploop.core.trees import to_device
from steploop.data.batches import epoch_of_parts
from steploop.errors import ConfigError, DataError, SteploopError
from steploop.recipe.config_values import configure, fields_of
from steploop.recipe.recipe import Recipe
from steploop.recipe.recipe_files import load_recipe_file
from steploop.runs.capsules.capsule_files import Capsule, read_capsule
from steploop.runs.directory_reader import read_file
from steploop.runs.reading import SOURCE_LIMIT
from steploop.tools.replay.culprit import Finding, broken_before, judge
from steploop.tools.replay.module_watch import StepWatch

__all__ = ["Replay", "replay"]


@attrs.frozen(kw_only=True)
class Replay:
    """A step that was taken again.

    Attributes:
        capsule: what was replayed.
        losses: state name -> (loss then, loss now), as text.
        reproduced: whether the step is again not finite, with the same loss.
        finding: None where the step is finite here.
        anomaly: what torch's anomaly detection said of the backward pass, or None.
        overflow: whether the same step is finite without the loss scale: the scale was too high, and nothing else.
        inexact: names of states that could only be kept as they were after the step.
    """

    capsule: Capsule
    losses: Mapping[str, tuple[str | None, str | None]]
    reproduced: bool
    finding: Finding | None
    anomaly: str | None
    overflow: bool
    inexact: tuple[str, ...]


_ANY_ROW = 10**9  # is longer than any row of skipped steps that a recipe allows


def _each(state: State, change: Callable[[TrainState], TrainState]) -> State:
    return {name: change(one) for name, one in state.items()} if isinstance(state, Mapping) else change(state)


def rebuild(capsule: Capsule, device: torch.device) -> tuple[Recipe, State, Any]:
    """The recipe of a capsule, the state before its step, and its batch, on ``device``.

    Raises:
        ConfigError: the recipe is missing or does not load.
        CheckpointError: the state is damaged or does not fit the recipe.
    """
    path = capsule.path / "recipe.py"
    if read_file(path.parent, path.name, limit=SOURCE_LIMIT) is None:
        raise ConfigError(
            f"{capsule.path} holds no recipe.py. Copy the run's recipe there to replay the step."
        )
    recorded = capsule.config.get("recipe", {})
    recorded = recorded if isinstance(recorded, Mapping) else {}
    origin = recorded.get("path")
    file = load_recipe_file(path, beside=Path(origin).parent if origin else None)
    known = fields_of(file.config_class)
    values = {key: value for key, value in capsule.config.get("config", {}).items() if key in known}
    recipe = file.build(configure(file.config_class, values, where=recorded.get("name") or "recipe"), device)
    for _ in range(capsule.about.get("phase") or 0):
        if recipe.then is not None:
            recipe = recipe.then(recipe.state)
    with warnings.catch_warnings():
        # the last bits may differ elsewhere; what is not finite will not hide in them, and the report compares
        warnings.simplefilter("ignore", category=UserWarning)
        state = checkpoint.load(capsule.path / "state", like=recipe.state)
    parts = capsule.about.get("parts")
    ranks = None if parts is None else Ranks(parts=parts)
    if ranks is not None:
        state = _each(state, lambda one: with_ranks(one, ranks))
    batch = capsule.batch
    if batch is None:
        about = capsule.about
        batch = next(iter(epoch_of_parts(recipe.batches, ranks, about["epoch"], about["batch"])), None)
        if batch is None:
            raise DataError(
                f"{capsule.path} names batch {about['batch']} of epoch {about['epoch']}, and the recipe's data have no such batch. "
                "The capsule or the data were changed."
            )
    # it may be the last that the step allows in a row, or the only one: it is to be seen, not refused
    return recipe, _each(state, lambda one: one.replace(nonfinite_steps=-_ANY_ROW)), to_device(batch, device)


def replay(path: Path, *, device: torch.device | None = None) -> Replay:
    """Take the step of a capsule again, under watch, and say what happened. Changes nothing in the capsule.

    Args:
        path: the capsule.
        device: where; None: on the CPU.

    Raises:
        ConfigError: there is no capsule, or its recipe does not load.
        CheckpointError: its state is damaged or does not fit the recipe.
        DataError: the capsule is damaged, or its step cannot be taken again.
    """
    capsule = read_capsule(path)
    try:
        return _replayed(capsule, *rebuild(capsule, device or torch.device("cpu")))
    except SteploopError:
        raise
    except Exception as error:  # the recipe's own code, on what the capsule holds
        raise DataError(
            f"The step of {path} cannot be taken again: {type(error).__name__}: {error}. The capsule was changed, or the "
            "recipe in it does not fit. steploop --debug replay shows the traceback."
        ) from error


def _replayed(capsule: Capsule, recipe: Recipe, state: State, batch: Any) -> Replay:
    """The step of a capsule, taken again under watch."""
    names = list(members(state))
    before = broken_before(members(state))
    with torch.compiler.set_stance("force_eager"):  # hooks see nothing of a compiled step
        clone = _each(state, TrainState.clone)
        watch = StepWatch({name: one.model for name, one in members(clone).items()})
        with watch:
            after = members(recipe.train_step(clone, batch))
        bad = [name for name in names if not _finite(after[name])]
        finding = None
        if bad:
            finding = before or judge(
                watch, batch, loss_finite=all(_loss_finite(after[name]) for name in bad)
            )
        overflow = (
            bool(bad) and finding is not None and finding.backward and _finite_unscaled(recipe, state, batch)
        )
        anomaly = _anomaly(recipe, _each(state, TrainState.clone), batch) if bad else None
    then = {name: capsule.about["states"].get(name, {}).get("loss") for name in names}
    losses = {
        name: (then[name], None if (now := after[name].loss) is None else repr(float(now))) for name in names
    }
    inexact = tuple(n for n, seen in capsule.about["states"].items() if not seen["exact"])
    return Replay(
        capsule=capsule,
        losses=losses,
        reproduced=bool(bad) and all(old == new for old, new in losses.values()),
        finding=finding,
        anomaly=anomaly,
        overflow=overflow,
        inexact=inexact,
    )


def _finite(state: TrainState) -> bool:
    return state.finite is None or bool(state.finite)


def _loss_finite(state: TrainState) -> bool:
    return state.loss is None or math.isfinite(state.loss.item())


def _finite_unscaled(recipe: Recipe, state: State, batch: Any) -> bool:
    """Whether the step is finite with a loss scale of 1."""
    if all(one.scale is None for one in members(state).values()):
        return False

    def unscaled(one: TrainState) -> TrainState:
        clone = one.clone()
        return clone if clone.scale is None else clone.replace(scale=attrs.evolve(clone.scale, scale=1.0))

    after = recipe.train_step(_each(state, unscaled), batch)
    return all(_finite(one) for one in members(after).values())


def _anomaly(recipe: Recipe, state: State, batch: Any) -> str | None:
    """What torch's own detection says: it stops at the first nan in a backward pass, and knows nothing of inf."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            try:
                recipe.train_step(state, batch)
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                traces = [str(w.message) for w in caught if "Traceback of forward call" in str(w.message)]
                return "\n".join([str(error), *(_own_lines(trace) for trace in traces[:1])]).strip()
    return None


def _own_lines(trace: str) -> str:
    """Of a forward traceback, the frames of the recipe: the last ones that are neither torch's nor steploop's."""
    frames = trace.split('  File "')[1:]
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))
    own = [frame for frame in frames if not frame.startswith(ours)]
    return "".join('  File "' + frame for frame in own[-2:]).split("\n (Triggered")[0].rstrip()
