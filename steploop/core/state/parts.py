"""The three parts of a TrainState: plain values, values in tensors, and what is in flight within a step.

Whatever copies, compares, saves, traces or places a state goes through the fields of these classes, so that a field
is listed once: here.
"""

from collections.abc import Mapping
from typing import Any, Self

import attrs
from torch import Tensor

from steploop.core.early_stopping import Best, StoppingState
from steploop.core.plateau import PlateauState
from steploop.core.precision import LossScale, Precision

__all__ = [
    "DERIVED",
    "Began",
    "Gradients",
    "InFlight",
    "PlainValues",
    "Replaceable",
    "TensorValues",
    "field_names",
    "plain_names",
    "result_names",
]

# Metadata of a field that follows from the others: never saved, compared or counted.
DERIVED = {"derived": True}
# Metadata of a field in flight that ends with the step; the others are results, which stay until the next one.
WITHIN = {"within": True}


class Replaceable:
    """A frozen value that can be copied with some fields changed, unchecked."""

    def replace(self, **changes: Any) -> Self:
        """This value with some fields changed: a fifth of the time of ``attrs.evolve``, and no checks."""
        new = _new(type(self))
        _set(new, "__dict__", {**self.__dict__, **changes})
        return new

    def over(self, fields: dict[str, Any]) -> Self:
        """A value of this class over a dictionary of all its fields, which it takes as its own."""
        new = _new(type(self))
        _set(new, "__dict__", fields)
        return new


_new = object.__new__
_set = object.__setattr__  # torch.compile around a step follows this, and no descriptor


def field_names(part: type[Any]) -> tuple[str, ...]:
    """The names of a part's fields, without those that follow from the others."""
    return tuple(f.name for f in attrs.fields(part) if not f.metadata.get("derived"))


# The fields of a TrainState that are no plain values.
_STRUCTURE = {"tensors", "flight", "machine", "lease", "generation"}


def plain_names(state: type[Any]) -> tuple[str, ...]:
    """The names of the plain values of a class of states."""
    return tuple(name for name in field_names(state) if name not in _STRUCTURE)


def result_names(flight: type[Any]) -> tuple[str, ...]:
    """The names of the fields in flight that a finished step leaves."""
    return tuple(name for name in field_names(flight) if name not in _ended(flight))


def _ended(flight: type[Any]) -> dict[str, Any]:
    """Name -> default of the fields in flight that end with the step; looked up once for each class."""
    if (known := _ENDED.get(flight)) is None:
        known = _ENDED[flight] = {f.name: f.default for f in attrs.fields(flight) if f.metadata.get("within")}
    return known


_ENDED: dict[type[Any], dict[str, Any]] = {}


def _defaults(flight: type[Any]) -> dict[str, Any]:
    """Name -> default of every field in flight; looked up once for each class."""
    if (known := _DEFAULTS.get(flight)) is None:
        known = _DEFAULTS[flight] = {f.name: f.default for f in attrs.fields(flight)}
    return known


_DEFAULTS: dict[type[Any], dict[str, Any]] = {}


@attrs.frozen(eq=False, kw_only=True, slots=False)
class PlainValues(Replaceable):
    """What a state holds besides tensors; ``attrs.evolve(state, ...)`` changes these.

    Attributes:
        hyper: all that each parameter group of the optimizer holds besides its parameters; values only.
        seed: of everything random: a pass is seeded from (seed, attempted_steps, number of the pass).
        epoch: epochs finished; with ``batch`` the cursor into the data.
        batch: batches consumed in this epoch; ``optimizer_step`` advances it.
        attempted_steps: optimizer steps tried, taken or not.
        applied_steps: optimizer steps taken; schedules follow it. A 0-dim tensor while the count is on a device.
        nonfinite_steps: steps not taken in a row because a gradient was not finite; resets when one is taken.
        precision: "fp32", "bf16" or "fp16"; parameters are float32 under each.
        scale: the loss scale of fp16; None for the others.
        early_stopping: what ``EarlyStopping`` carries, or None.
        plateau: what ``ReduceLROnPlateau`` carries, or None.
        best: the best value of the monitored metric and where it was reached, or None.
    """

    hyper: tuple[Mapping[str, Any], ...]
    seed: int = 0
    epoch: int = 0
    batch: int = 0
    attempted_steps: int = 0
    applied_steps: int | Tensor = 0
    nonfinite_steps: int | Tensor = 0
    precision: Precision = "fp32"
    scale: LossScale | None = None
    early_stopping: StoppingState | None = None
    plateau: PlateauState | None = None
    best: Best | None = None


@attrs.frozen(eq=False, kw_only=True, slots=False)
class TensorValues(Replaceable):
    """What a state holds in tensors; step functions change these, ``with_params`` and ``with_carry``.

    Attributes:
        params: parameter name -> tensor, in the order of ``model.named_parameters()``.
        buffers: buffer name -> tensor, in the order of the model's; one that is None is left out.
        slots: parameter name -> slot name -> what the optimizer keeps for the parameter.
        beside: what the optimizer keeps besides parameters and groups: "state" (keys that are no parameters) and
            "attributes" (of the optimizer itself); empty for torch's own optimizers.
        extra: module name -> what its ``get_extra_state`` gave; module and attribute name -> a plain attribute that
            passes change.
        ema: parameter (or buffer) name -> its average, or None.
        carry: the user's own tree of tensors and plain values, or None.
        leaves: the trainable parameters, in the order of ``params``.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    slots: dict[str, dict[str, Any]]
    beside: dict[str, Any] = attrs.field(factory=dict)
    extra: dict[str, Any] = attrs.field(factory=dict)
    ema: dict[str, Tensor] | None = None
    carry: Any = None
    leaves: tuple[Tensor, ...] = attrs.field(default=(), metadata=DERIVED)


@attrs.define(eq=False)
class Gradients:
    """Gradients in flight, in the order of the trainable parameters; unscaling and clipping take them over."""

    values: list[Tensor | None]
    taken_by: str | None = None


@attrs.frozen(eq=False, slots=False)
class Began:
    """What a step began with: a skipped step brings it back, however many passes there were.

    Attributes:
        tensors: the values before the first pass.
        overwritten: name -> value of each trained parameter that a forward pass changed in place.
    """

    tensors: TensorValues
    overwritten: dict[str, Tensor] = attrs.field(factory=dict)


@attrs.frozen(eq=False, kw_only=True, slots=False)
class InFlight(Replaceable):
    """What goes from one step function to the next; never saved.

    Attributes:
        loss: of this step, shape (), not scaled; None before ``forward_loss``.
        outputs: what the objective gave besides the loss.
        grad_norm: global L2 norm of the unscaled gradients before clipping, shape ().
        clipped_norm: the same after clipping, for logs.
        finite: whether all gradients were finite; a 0-dim bool tensor while the answer is on a device.
        graph: the loss with its graph, until ``backward_scaled`` uses it up.
        grads: the gradients, until ``optimizer_step`` uses them.
        began: what the step began with; None between steps.
        passes: forward passes of this step so far.
        known: applied and attempted steps when the host last knew both.
    """

    loss: Tensor | None = None
    outputs: Any = None
    grad_norm: Tensor | None = None
    clipped_norm: float | Tensor | None = None
    finite: bool | Tensor | None = None
    graph: Any = attrs.field(default=None, metadata=WITHIN)
    grads: Gradients | None = attrs.field(default=None, metadata=WITHIN)
    began: Began | None = attrs.field(default=None, metadata=WITHIN)
    passes: int = attrs.field(default=0, metadata=WITHIN)
    known: tuple[int, int] = (0, 0)

    def begun(self, **values: Any) -> Self:
        """What is in flight after the forward passes of a step: these values, and nothing of the step before."""
        new = _new(type(self))
        _set(new, "__dict__", _defaults(type(self)) | values)
        return new

    def ended(self, **results: Any) -> Self:
        """What a finished step leaves: its results, and nothing that the next step could go on from."""
        new = _new(type(self))
        _set(new, "__dict__", self.__dict__ | _ended(type(self)) | results)
        return new
