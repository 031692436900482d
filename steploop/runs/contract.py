"""Record what a run is, and compare it at every resume: nothing that is given anew is ignored.

config.json holds the record: the recipe's text and the modules from its folder, the Config, how the step runs, and for
each phase what the data are, in which batches they come, and which values the state began with.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from steploop.core.precision import LossScale
from steploop.core.state.several import State, members
from steploop.core.state.train_state import TrainState
from steploop.core.trees import named_leaves
from steploop.errors import CheckpointIncompatibleError
from steploop.recipe.recipe import Batches, Recipe
from steploop.runs.fingerprints import fingerprint

__all__ = [
    "Change",
    "changed_code",
    "changed_settings",
    "first_values",
    "phase_record",
    "refuse_inexact",
    "sentence",
]

# Attributes of a Loader (and of a Stream, or of a class of the user's) that say which samples lie at a position.
_ORDER = ("batch_size", "seed", "shuffle", "drop_last", "world_size")
_MOST_LEAVES = 64  # a tree with more is a list of samples, not a tuple of arrays


@attrs.frozen
class Change:
    """One thing that is not what it was.

    Attributes:
        name: of the setting or file.
        before: what it was; None where it is new.
        now: what it is; None where it is gone.
        kind: "setting", or what else it is.
    """

    name: str
    before: Any
    now: Any
    kind: str = "setting"

    def __str__(self) -> str:
        if self.kind in {"recipe", "module"}:
            return f"{self.kind} {self.name}"
        return f"{self.name} {_said(self.before)} -> {_said(self.now)}"


def _said(value: Any) -> str:
    text = "none" if value is None else repr(value) if value == "" else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sentence(changes: Sequence[Change]) -> str:
    """The changes in words, for a note or an error."""
    return ", ".join(map(str, changes))


def changed_settings(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> list[Change]:
    """The fields of a Config, as JSON, that are not as recorded; those that the recipe gained or lost among them."""
    names = [*recorded, *(name for name in config if name not in recorded)]
    return [Change(n, recorded.get(n), config.get(n)) for n in names if recorded.get(n) != config.get(n)]


def changed_code(
    recorded: Mapping[str, Any], *, name: str, sha256: str, modules: Mapping[str, str]
) -> list[Change]:
    """The recipe, and the modules that it imports from its folder, where their text is not as recorded.

    Args:
        recorded: "recipe" of config.json.
        name: what to call the recipe.
        sha256: its digest now.
        modules: module -> digest now. Records of version 0.1.0 have none, and nothing is said of them.
    """
    found = (
        [] if recorded.get("sha256") == sha256 else [Change(name, recorded.get("sha256"), sha256, "recipe")]
    )
    before = recorded.get("modules")
    if isinstance(before, Mapping):
        names = sorted({*before, *modules})
        found += [
            Change(n, before.get(n), modules.get(n), "module")
            for n in names
            if before.get(n) != modules.get(n)
        ]
    return found


def refuse_inexact(changes: Sequence[Change]) -> None:
    """Refuse to go on where an exact resume was required and something is not what it was.

    Raises:
        CheckpointIncompatibleError: lists the changes.
    """
    if changes:
        raise CheckpointIncompatibleError(
            f"--require-exact: the run would not go on as it was. Changed: {sentence(changes)}. Resume it with what it was "
            "begun with, or leave --require-exact out."
        )


def phase_record(recipe: Recipe) -> dict[str, Any]:
    """What a phase of a run is, as JSON."""
    stopping = recipe.early_stopping
    return {
        "data": {
            "note": recipe.data,
            "samples": _samples(recipe.batches),
            "kind": type(getattr(recipe.batches, "dataset", None)).__qualname__,
            "content": _content(recipe.batches),
        },
        "batches": {"per_epoch": len(recipe.batches), **_order(recipe.batches)},
        "restorable": bool(getattr(recipe.batches, "restorable", True)),
        "monitor": [recipe.monitor, recipe.mode],
        "early_stopping": None if stopping is None else [stopping.monitor, stopping.mode],
        "plateau": None if recipe.plateau is None else [recipe.plateau.lr, recipe.plateau.mode],
        "start": first_values(recipe.state),
    }


def _samples(batches: Batches) -> int | None:
    found = getattr(batches, "num_samples", None)
    return found if type(found) is int else None


def _order(batches: Batches) -> dict[str, Any]:
    values = {name: getattr(batches, name, None) for name in _ORDER}
    return {name: value for name, value in values.items() if type(value) in {int, bool}}


def _content(batches: Batches) -> str | None:
    """The fingerprint of data that are arrays in memory; None for others, of which nothing is read."""
    dataset = getattr(batches, "dataset", None)
    if not isinstance(dataset, (Tensor, np.ndarray, tuple, Mapping)):
        return None
    leaves = list(islice(named_leaves(dataset), _MOST_LEAVES + 1))
    tensors = [(name, found) for name, leaf in leaves if (found := _as_tensor(leaf)) is not None]
    return fingerprint(tensors) if len(tensors) == len(leaves) <= _MOST_LEAVES else None


def _as_tensor(leaf: Any) -> Tensor | None:
    if isinstance(leaf, np.ndarray):
        try:
            return torch.from_numpy(leaf)
        except (TypeError, ValueError):  # texts, or memory that torch cannot look at
            return None
    return leaf if isinstance(leaf, Tensor) else None


def first_values(state: State) -> dict[str, Any]:
    """What the states of a phase begin with: seed, hyperparameters, loss scale, and a fingerprint of the weights."""
    return {name: _start_of(one) for name, one in members(state).items()}


def _start_of(state: TrainState) -> dict[str, Any]:
    return {
        "seed": state.seed,
        "hyper": [{key: as_json(value) for key, value in group.items()} for group in state.hyper],
        "scale": None if state.scale is None else scale_record(state.scale),
        "weights": fingerprint(_weights(state)),
    }


def scale_record(scale: LossScale) -> dict[str, Any]:
    """A loss scale as JSON."""
    return {name: as_json(value) for name, value in attrs.asdict(scale).items()}


def _weights(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    yield from state.params.items()
    yield from state.buffers.items()
    yield from ((f"carry.{n}", leaf) for n, leaf in named_leaves(state.carry) if isinstance(leaf, Tensor))


def as_json(value: Any) -> Any:
    """A hyperparameter as JSON has it, for a comparison: tensors as numbers, others as their text."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= _MOST_LEAVES else str(tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    plain = value is None or isinstance(value, (bool, int, str))
    return value if plain or (isinstance(value, float) and abs(value) < float("inf")) else str(value)
