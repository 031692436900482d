"""Find out how a recipe's batch is cut into samples, and whether that is known or only supposed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.core.trees import map_tensors, named_leaves
from steploop.data.loader import Loader
from steploop.recipe.recipe import Recipe
from steploop.testing.state_comparison import clone, copied
from steploop.tools.check.one_line import one_line

__all__ = ["Structure", "first_samples", "incomparable", "structure_of"]

_ASK = "Recipe(samples_of=...) can say how to take the first n samples of a batch."
# Leaves of a batch that hold no sample of their own, or that two equal batches have equal.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@attrs.frozen(kw_only=True)
class Structure:
    """How a batch is cut into samples.

    Attributes:
        cut: ``(batch, n) -> batch`` of its first n samples; None: the batch is used whole.
        certain: whether it is known that ``cut`` cuts between samples: the recipe or its Loader says so. Where it is only
            supposed, a law that rests on it may pass but never fails.
        why: why the batch is not cut, or what is supposed.
    """

    cut: Callable[[Any, int], Any] | None
    certain: bool
    why: str = ""


def first_samples(batch: Any, count: int) -> Any:
    """The first ``count`` entries along the first axis of every tensor."""
    return map_tensors(lambda t: t[:count] if t.dim() else t, batch)


def structure_of(recipe: Recipe, batch: Any, samples: int, fresh: Callable[[], Recipe]) -> Structure:
    """Find out how ``batch`` is cut: the recipe says it, or every first axis agrees and the train step takes the part.

    Args:
        recipe: whose batch it is.
        batch: uncut.
        samples: to how many it would be cut.
        fresh: builds the recipe once more, to try a step on a part of the batch.
    """
    if recipe.samples_of is not None:
        return Structure(cut=recipe.samples_of, certain=True)
    supposed = _suppose(recipe, batch)
    if supposed.cut is None or first_axis(batch) <= samples:
        return supposed
    failure = _fails_on_a_part(fresh(), batch, supposed.cut(copied(batch), samples))
    if failure is None:
        return supposed
    return Structure(
        cut=None, certain=False, why=f"train_step takes no batch of {samples} samples ({failure}). {_ASK}"
    )


def first_axis(batch: Any) -> int:
    """The length of the first axis of the first tensor that has one; 0 without any."""
    return next((t.shape[0] for _, t in named_leaves(batch) if isinstance(t, Tensor) and t.dim()), 0)


def _suppose(recipe: Recipe, batch: Any) -> Structure:
    leaves = [leaf for _, leaf in named_leaves(batch)]
    lengths = sorted({leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()})
    reason = next((found for found in map(_unlike_samples, leaves) if found), None)
    if reason is not None:
        return Structure(cut=None, certain=False, why=f"{reason}. {_ASK}")
    if len(lengths) != 1:
        axes = f"the first axes of the batch's tensors differ: {lengths}"
        why = axes if lengths else "the batch holds no tensor with an axis for samples"
        return Structure(cut=None, certain=False, why=f"{why}. {_ASK}")
    loader = recipe.batches
    if not isinstance(loader, Loader):
        why = f"it is only supposed that the first axis ({lengths[0]}) counts samples. {_ASK}"
        return Structure(cut=first_samples, certain=False, why=why)
    size = min(loader.batch_size, loader.num_samples)
    if lengths[0] != size:
        why = f"a batch of {size} samples has tensors whose first axis is {lengths[0]}. {_ASK}"
        return Structure(cut=None, certain=False, why=why)
    return Structure(cut=first_samples, certain=True)


def _unlike_samples(leaf: Any) -> str | None:
    """Why a leaf has no first axis that could count samples; None where it is a dense tensor or a plain value."""
    if not isinstance(leaf, Tensor):
        return None if isinstance(leaf, _PLAIN) else f"the batch holds a value of type {type(leaf).__name__}"
    if leaf.is_nested:
        return "the batch holds a nested tensor"
    return None if leaf.layout is torch.strided else "the batch holds a sparse tensor"


def _fails_on_a_part(recipe: Recipe, whole: Any, part: Any) -> str | None:
    """What a train step says of a part of a batch that it takes whole; None where it takes both, or neither."""
    try:
        recipe.train_step(clone(recipe.state), part)
    except Exception as error:  # noqa: BLE001  (a recipe may raise anything)
        try:
            recipe.train_step(clone(recipe.state), copied(whole))
        except Exception:  # noqa: BLE001  (then the laws will say it)
            return None
        return one_line(error)
    return None


def incomparable(batch: Any) -> str | None:
    """The type of the first leaf of which nobody knows whether two of them are equal; None without any."""
    for _, leaf in named_leaves(batch):
        equality: Any = type(leaf).__eq__
        known = isinstance(leaf, (Tensor, *_PLAIN)) or dataclasses.is_dataclass(leaf)
        if not known and equality is object.__eq__:
            return type(leaf).__name__
    return None
