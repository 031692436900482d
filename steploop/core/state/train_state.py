"""TrainState: the immutable value that a training step takes and gives; all that the next step depends on."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from steploop.core.early_stopping import Best, StoppingState
from steploop.core.plateau import PlateauState
from steploop.core.precision import LossScale, Precision, check_precision
from steploop.core.state.creation import OptimizerDescription, copy_leaf, initial_fields
from steploop.core.state.machine import Machine
from steploop.core.state.ownership import Lease
from steploop.core.state.surroundings import shielded
from steploop.core.trees import map_tensors
from steploop.errors import ConfigError, SpentStateError

__all__ = ["Gradients", "TrainState", "read_host"]


@attrs.define(eq=False)
class Gradients:
    """Gradients in flight, in the order of the trainable parameters; unscaling and clipping take them over."""

    values: list[Tensor | None]
    taken_by: str | None = None


def read_host(value: int | Tensor) -> int:
    """A counter as a Python int; waits for the device where the counter is there."""
    return int(value.item()) if isinstance(value, Tensor) else value


@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False)
class TrainState:
    """All that the next training step depends on, as one immutable value.

    Make one with ``TrainState.create``; the step functions give the next ones. Copy it with ``clone()``; change
    a field that is a plain value with ``attrs.evolve``. Reading the tensors of a state that has given them away
    raises ``SpentStateError``.

    Attributes:
        seed: of everything random: a step's generator is seeded from (seed, attempted_steps).
        epoch: epochs finished; with ``batch`` the cursor into the data.
        batch: batches consumed in this epoch; ``optimizer_step`` advances it.
        attempted_steps: optimizer steps tried, taken or not.
        applied_steps: optimizer steps taken; schedules follow it. A 0-dim tensor while the count is on a device.
        nonfinite_steps: steps not taken in a row because a gradient was not finite; resets when one is taken.
        precision: "fp32", "bf16" or "fp16"; parameters are float32 under each.
        scale: the loss scale of fp16; None for the others.
        hyper: the hyperparameters of each parameter group; values only.
        early_stopping: what ``EarlyStopping`` carries, or None.
        plateau: what ``ReduceLROnPlateau`` carries, or None.
        best: the best value of the monitored metric and where it was reached, or None.
        loss: of this step, shape (), not scaled; None before ``forward_loss``.
        outputs: what the objective gave besides the loss, detached; None before ``forward_loss``.
        grad_norm: global L2 norm of the unscaled gradients before clipping, shape ().
        clipped_norm: the same after clipping, for logs.
        finite: whether all gradients were finite; a 0-dim bool tensor while the answer is on a device.
    """

    _params: dict[str, Tensor]
    _buffers: dict[str, Tensor]
    _slots: dict[str, dict[str, Any]]
    _machine: Machine
    _lease: Lease = attrs.field(factory=Lease)
    _generation: int = 0
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
    _ema: dict[str, Tensor] | None = None
    _leaves: tuple[Tensor, ...] = ()
    _known: tuple[int, int] = (0, 0)  # applied and attempted steps when the host last knew both
    # in flight, from one step function to the next; never saved
    _graph: Tensor | None = None
    _old_buffers: dict[str, Tensor] | None = None
    _grads: Gradients | None = None
    loss: Tensor | None = None
    outputs: Any = None
    grad_norm: Tensor | None = None
    clipped_norm: float | Tensor | None = None
    finite: bool | Tensor | None = None

    def __attrs_post_init__(self) -> None:
        """A state cannot be half fp16 and half not."""
        check_precision(self.precision)
        if (self.scale is not None) != (self.precision == "fp16"):
            raise ConfigError(
                f"TrainState: fp16 needs a LossScale and {self.precision} has none, but precision is "
                f"{self.precision!r} and scale is {self.scale!r}. Make a new state with TrainState.create(..., "
                "precision=...)."
            )

    @classmethod
    def create(
        cls,
        model: nn.Module,
        optimizer: OptimizerDescription,
        *,
        seed: int = 0,
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        memory_format: torch.memory_format | None = None,
        loss_scale: LossScale | None = None,
        ema: bool = False,
    ) -> Self:
        """The first state of a run, over the model's own tensors.

        The model's values become the state's: the model computes with them from now on, and holds the newest
        ones after each step. If another living state has them already, this one starts from a copy.

        A model in eval mode is put back into training; submodules in eval mode under a training root stay so.

        Args:
            model: moved to ``device`` and ``memory_format``, as ``model.to`` does.
            optimizer: a ``steploop.Optimizer``. Parameters that require no gradient are left out.
            seed: of everything random in the run.
            precision: "fp32", "bf16" or "fp16".
            device: where to train; None leaves the model where it is.
            memory_format: ``torch.channels_last`` suits convolutions.
            loss_scale: for fp16; None means ``LossScale()``.
            ema: whether to carry an exponential moving average of the weights (see ``update_ema``).

        Raises:
            ConfigError: a lazy or meta parameter, parameters on several devices or none to train, fp16 or bf16
                parameters under precision="fp16", or a loss scale without fp16.
        """
        return cls(
            **initial_fields(
                model,
                optimizer,
                seed=seed,
                precision=precision,
                device=device,
                memory_format=memory_format,
                loss_scale=loss_scale,
                ema=ema,
            )
        )

    # -- values ---------------------------------------------------------------------------------------------

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Parameter name -> tensor, in the order of ``model.named_parameters()``."""
        self.check_alive("params")
        return MappingProxyType(self._params)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Buffer name -> tensor, in the order of ``model.named_buffers()``."""
        self.check_alive("buffers")
        return MappingProxyType(self._buffers)

    @property
    def slots(self) -> Mapping[str, Mapping[str, Any]]:
        """Parameter name -> slot name -> what the optimizer keeps for it: momentum, moments, a step count."""
        self.check_alive("slots")
        return MappingProxyType(self._slots)

    @property
    def ema(self) -> Mapping[str, Tensor] | None:
        """Parameter name -> its exponential moving average, or None."""
        self.check_alive("ema")
        return None if self._ema is None else MappingProxyType(self._ema)

    @property
    def grads(self) -> Mapping[str, Tensor] | None:
        """Name -> gradient of each parameter that the loss depends on; None outside of a step."""
        self.check_alive("grads")
        if self._grads is None:
            return None
        if self._grads.taken_by is not None:
            raise SpentStateError(
                f"The gradients of this state were given to {self._grads.taken_by}, which works on them in place. "
                "Read them from the state that it returned."
            )
        pairs = zip(self._machine.trainable, self._grads.values, strict=True)
        return MappingProxyType({name: g for name, g in pairs if g is not None})

    @property
    def step(self) -> int:
        """Optimizer steps taken: ``applied_steps`` as a number."""
        return read_host(self.applied_steps)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group."""
        return float(self.hyper[0]["lr"])

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self._machine.device

    @property
    def model(self) -> nn.Module:
        """The module that computes, holding this state's parameters and buffers.

        For looking, exporting and calling by hand. Another state's next step takes the module back for itself.
        """
        self.check_alive("model")
        module = self._machine.module
        module.place_params(self._params)
        module.place_buffers(self._buffers)
        module.holder.give_to(self._lease)
        return module.model

    # -- copies ---------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """This state with some fields changed, unchecked: the step functions' way, a fifth of ``attrs.evolve``'s time."""
        new = object.__new__(type(self))
        object.__setattr__(new, "__dict__", self.__dict__ | changes)
        return new

    @shielded
    def clone(self) -> Self:
        """A copy that shares no tensor with this state: what is done to one is never seen by the other."""
        self.check_alive("clone()")
        params = {name: copy_leaf(p) for name, p in self._params.items()}
        grads = self._grads
        return self.replace(
            _params=params,
            _buffers={n: b.clone() for n, b in self._buffers.items()},
            _slots={n: map_tensors(Tensor.clone, slot) for n, slot in self._slots.items()},
            _ema=None if self._ema is None else {n: t.clone() for n, t in self._ema.items()},
            _lease=Lease(),
            _generation=0,
            _leaves=tuple(params[name] for name in self._machine.trainable),
            _graph=None,
            _grads=None
            if grads is None
            else Gradients([None if g is None else g.clone() for g in grads.values], grads.taken_by),
        )

    def settle(self) -> Self:
        """This state with its counters and its scale read to the host: waits for the device, once."""
        changes: dict[str, Any] = {
            key: read_host(value)
            for key in ("applied_steps", "nonfinite_steps")
            if isinstance(value := getattr(self, key), Tensor)
        }
        if self.scale is not None and isinstance(self.scale.scale, Tensor):
            tracker = read_host(self.scale.growth_tracker)
            changes["scale"] = attrs.evolve(
                self.scale, scale=float(self.scale.scale.item()), growth_tracker=tracker
            )
        if isinstance(self.finite, Tensor):
            changes["finite"] = bool(self.finite.item())
        return self.replace(**changes) if changes else self

    # -- ownership ------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the tensors are still this state's: no step function has updated them in place."""
        return self._generation == self._lease.generation

    def check_alive(self, use: str) -> None:
        """Raise SpentStateError if the tensors of this state were given away."""
        if self._generation != self._lease.generation:
            raise self._lease.spent(use, self._generation, self.attempted_steps)

    def donate(self, by: str, **changes: Any) -> Self:
        """The next owner of this state's tensors; this state is spent."""
        lease = self._lease
        lease.generation += 1
        lease.spender = by
        return self.replace(_generation=lease.generation, **changes)

    def __repr__(self) -> str:
        """What a log line needs: never the tensors."""
        spent = "" if self.alive else " (spent)"
        count = sum(p.numel() for p in self._params.values())
        return (
            f"TrainState(step={self.applied_steps}, attempted={self.attempted_steps}, epoch={self.epoch}, batch={self.batch}, "
            f"precision={self.precision!r}, {count:,} parameters on {self.device}){spent}"
        )
