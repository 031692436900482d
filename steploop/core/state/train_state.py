"""TrainState: the immutable value that a training step takes and gives; all that the next step depends on."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import attrs
import torch
from torch import Tensor, nn

from steploop.core.html_tables import html_table
from steploop.core.optimizer import check_rate
from steploop.core.precision import LossScale, Precision, check_precision
from steploop.core.ranks import Ranks
from steploop.core.state.copying import copy_began, copy_tensors
from steploop.core.state.creation import OptimizerDescription, initial_values
from steploop.core.state.given_values import check_values, own_carry, with_values
from steploop.core.state.machine import Machine
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import Gradients, InFlight, PlainValues, TensorValues, field_names, plain_names
from steploop.core.state.state_text import state_line, state_rows
from steploop.core.state.surroundings import shielded
from steploop.core.state.trace import trace_of
from steploop.core.trees import map_tensors
from steploop.errors import CompileError, ConfigError, SpentStateError

__all__ = ["TrainState", "read_host"]

_NOTHING = InFlight()
_OTHERS = frozenset({*field_names(TensorValues), *field_names(InFlight)})


def read_host(value: int | Tensor) -> int:
    """A counter as a Python int; waits for the device where the counter is there."""
    return int(value.item()) if isinstance(value, Tensor) else value


@attrs.frozen(eq=False, kw_only=True, repr=False, slots=False, init=False)
class TrainState(PlainValues):
    """All that the next training step depends on, as one immutable value.

    Make one with ``TrainState.create``; the step functions give the next ones. It has three parts: plain values,
    which are fields and change with ``attrs.evolve``; values in tensors (``params``, ``buffers``, ``slots``, ``ema``,
    ``carry``), which change by step functions, ``with_params`` and ``with_carry``; and results in flight from one step
    function to the next (``loss``, ``outputs``, ``grads``, ``grad_norm``, ``clipped_norm``, ``finite``). Copy it with
    ``clone()``. Reading the tensors of a state that has given them away raises ``SpentStateError``.

    The fields that a user may read and change are those of ``steploop.core.state.parts.PlainValues``.

    Attributes:
        tensors: the values in tensors.
        flight: what goes from one step function to the next.
        machine: the module and the optimizer that compute; never saved.
        lease: who owns the tensors.
        generation: of this state in the lease; another number there means that it is spent.

    Example:
        >>> state = TrainState.create(model, Optimizer(torch.optim.SGD, lr=0.1), seed=0)
        >>> state = reduce(train_step, batches, state)
        >>> state.step, state.learning_rate
        (4, 0.1)
    """

    tensors: TensorValues
    flight: InFlight = _NOTHING
    machine: Machine
    lease: Lease
    generation: int = 0

    if not TYPE_CHECKING:  # for a type checker attrs.evolve takes the plain values, as PlainValues has them

        def __init__(
            self,
            *,
            tensors: TensorValues,
            machine: Machine,
            lease: Lease,
            flight: InFlight = _NOTHING,
            generation: int = 0,
            **plain: Any,
        ) -> None:
            """Check what ``attrs.evolve`` was given: plain values, by their names."""
            for name in plain:
                if name in _OTHERS:
                    raise ConfigError(
                        f"attrs.evolve: {name} of a TrainState is no plain value, and a change of it would be lost or half "
                        "done. Use state.with_params({name: tensor}) or state.with_carry(tree); a step function makes the rest."
                    )
                if name not in (known := plain_names(type(self))):
                    raise ConfigError(f"TrainState has no plain value {name!r}. It has: {', '.join(known)}.")
            self.__attrs_init__(  # made by attrs
                tensors=tensors, machine=machine, lease=lease, flight=flight, generation=generation, **plain
            )

    def __attrs_post_init__(self) -> None:
        """A state cannot be half fp16 and half not, and its rates are rates."""
        check_precision(self.precision)
        if (self.scale is not None) != (self.precision == "fp16"):
            raise ConfigError(
                f"TrainState: fp16 needs a LossScale and {self.precision} has none, but precision is "
                f"{self.precision!r} and scale is {self.scale!r}. Make a new state with TrainState.create(..., "
                "precision=...)."
            )
        for index, group in enumerate(self.hyper):
            check_rate(f"TrainState: the lr of parameter group {index}", group.get("lr"))

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
        ema_buffers: bool = False,
        carry: Any = None,
        ranks: Ranks | None = None,
    ) -> Self:
        """Make the first state of a run, over the model's own tensors.

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
            ema_buffers: whether to average floating-point buffers too (BatchNorm's statistics); others are copied.
            carry: a first value for ``state.carry``: a tree of tensors and plain values of your own.
            ranks: the processes that train this state together (``Ranks.here()``); each of them makes it, all go on from
                the values of rank 0, and steps take ``Parts`` of a batch. None in the usual case, one process.

        Raises:
            ConfigError: a lazy or meta parameter, parameters on several devices or none to train, fp16 or bf16
                parameters under precision="fp16", a loss scale without fp16, an optimizer or a module that keeps
                what a state cannot hold, or a state that other ranks make otherwise.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> state = TrainState.create(model, steploop.Optimizer(torch.optim.SGD, lr=0.1), seed=0)
            >>> state.step, state.learning_rate
            (0, 0.1)
        """
        return cls(
            **initial_values(
                model,
                optimizer,
                seed=seed,
                precision=precision,
                device=device,
                memory_format=memory_format,
                loss_scale=loss_scale,
                ema=ema,
                ema_buffers=ema_buffers,
                carry=own_carry(carry),
                ranks=ranks,
            )
        )

    # -- values ---------------------------------------------------------------------------------------------

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Parameter name -> tensor, in the order of ``model.named_parameters()``."""
        self.check_alive("params")
        return MappingProxyType(self.tensors.params)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """Buffer name -> tensor, in the order of ``model.named_buffers()``."""
        self.check_alive("buffers")
        return MappingProxyType(self.tensors.buffers)

    @property
    def slots(self) -> Mapping[str, Mapping[str, Any]]:
        """Parameter name -> slot name -> what the optimizer keeps for it: momentum, moments, a step count."""
        self.check_alive("slots")
        return MappingProxyType(self.tensors.slots)

    @property
    def ema(self) -> Mapping[str, Tensor] | None:
        """Parameter name -> its exponential moving average, or None; averaged buffers are among them."""
        self.check_alive("ema")
        return None if self.tensors.ema is None else MappingProxyType(self.tensors.ema)

    @property
    def carry(self) -> Any:
        """Your own tree of tensors and plain values: saved, copied and resumed with the state. See ``with_carry``."""
        self.check_alive("carry")
        return self.tensors.carry

    @property
    def grads(self) -> Mapping[str, Tensor] | None:
        """Name -> gradient of each parameter that the loss depends on; None outside of a step."""
        self.check_alive("grads")
        grads = self.flight.grads
        if grads is None:
            return None
        if grads.taken_by is not None:
            raise SpentStateError(
                f"The gradients of this state were given to {grads.taken_by}, which works on them in place. "
                "Read them from the state that it returned."
            )
        pairs = zip(self.machine.trainable, grads.values, strict=True)
        return MappingProxyType({name: g for name, g in pairs if g is not None})

    @property
    def loss(self) -> Tensor | None:
        """The loss of this step, shape (), not scaled; None before ``forward_loss``."""
        return self.flight.loss

    @property
    def outputs(self) -> Any:
        """What the objective gave besides the loss; None before ``forward_loss``."""
        return self.flight.outputs

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm of the unscaled gradients before clipping, shape ()."""
        return self.flight.grad_norm

    @property
    def clipped_norm(self) -> float | Tensor | None:
        """The global L2 norm after clipping."""
        return self.flight.clipped_norm

    @property
    def finite(self) -> bool | Tensor | None:
        """Whether all gradients were finite; a 0-dim bool tensor while the answer is on a device."""
        return self.flight.finite

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
        return self.machine.device

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train this state together; None if this is the only one. Never saved."""
        return self.machine.ranks

    @property
    def model(self) -> nn.Module:
        """The module that computes, holding this state's parameters and buffers.

        For looking, exporting and calling by hand. Another state's next step takes the module back for itself.
        """
        self.check_alive("model")
        module = self.machine.module
        module.place_params(self.tensors.params)
        module.place_buffers(self.tensors.buffers)
        module.set_extra_state(self.tensors.extra)
        module.holder.give_to(self.lease)
        return module.model

    # -- other values ---------------------------------------------------------------------------------------

    @shielded
    def with_params(self, values: Mapping[str, Tensor]) -> Self:
        """Make a state with other parameters or buffers; this one stays whole.

        The new state owns its tensors: everything is copied. Optimizer slots, averages, counters and the results of the
        last step are kept; a step that has begun ends.

        Args:
            values: parameter or buffer name -> tensor of its shape and dtype; names left out keep their values.

        Raises:
            ConfigError: a name that the state does not have, another shape or another dtype.

        Example:
            >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
            >>> float(state.with_params({"bias": torch.ones(1)}).params["bias"])
            1.0
        """
        self.check_alive("with_params")
        check_values(self.tensors, values)
        traced = trace_of(self) is not None
        if traced and any(name in self.tensors.params for name in values):
            raise CompileError(
                "calls with_params, which gives a state other parameters in the midst of a step. Call it between two steps."
            )
        new = self if traced else self.clone()  # a graph has its buffers for itself
        return new.replace(
            tensors=with_values(new.tensors, values, self.machine.trainable),
            flight=self.flight.ended(),
        )

    def with_carry(self, carry: Any) -> Self:
        """Make a state that carries another tree of your own; all its other tensors are shared with this one.

        A hidden state, a queue, a running reward, a stage of a curriculum: whatever the next step depends on. Tensors
        are detached, and the state's own: writing to yours changes none. A skipped step brings back the carry that the
        step began with.

        Args:
            carry: None, bool, int, float, str, tensors, and lists, tuples and mappings of them.

        Raises:
            ConfigError: it holds something else, which a checkpoint could not keep.

        Example:
            >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
            >>> state.with_carry({"reward": 0.5}).carry
            {'reward': 0.5}
        """
        self.check_alive("with_carry")
        return self.replace(tensors=self.tensors.replace(carry=own_carry(carry)))

    @shielded
    def clone(self) -> Self:
        """Make a copy that shares no tensor with this state: what is done to one is never seen by the other."""
        self.check_alive("clone()")
        machine, flight = self.machine, self.flight
        machine.check_groups()
        grads = flight.grads
        if grads is not None:
            grads = Gradients([None if g is None else g.clone() for g in grads.values], grads.taken_by)
        tensors, began = copy_tensors(self.tensors, machine.trainable), flight.began
        if began is not None:  # a skip brings it back: as the copy's own
            began = copy_began(began, self.tensors, tensors)
        return self.replace(
            tensors=tensors,
            hyper=tuple(map_tensors(Tensor.clone, group) for group in self.hyper),
            lease=Lease(),
            generation=0,
            flight=flight.replace(graph=None, grads=grads, began=began),
        )

    def settle(self) -> Self:
        """Read this state's counters and scale to the host: waits for the device, once."""
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
            changes["flight"] = self.flight.replace(finite=bool(self.finite.item()))
        return self.replace(**changes) if changes else self

    # -- ownership ------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the tensors are still this state's: no step function has updated them in place."""
        return self.generation == self.lease.generation

    def check_alive(self, use: str) -> None:
        """Raise SpentStateError if the tensors of this state were given away."""
        if self.generation != self.lease.generation:
            raise self.lease.spent(use, self.generation, self.attempted_steps)

    def __copy__(self) -> Self:
        """A value needs no shallow copy."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """``copy.deepcopy(state)`` is ``state.clone()``."""
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled: a pickle would hold the live module and optimizer, and code to run when it is read."""
        raise ConfigError(
            "A TrainState cannot be pickled. Save it with steploop.checkpoint.save(state, directory) and load it with "
            "steploop.checkpoint.load(directory, like=state)."
        )

    def __repr__(self) -> str:
        """What a log line needs: never the tensors."""
        return state_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: where the training stands, and never the tensors."""
        return html_table("TrainState", state_rows(self))
