"""One trace of a train step: what step functions and traced states ask of it, and what it has noted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from steploop.compilation.flattening import flatten, rebuild
from steploop.compilation.generator_events import Events, TracedGenerators
from steploop.compilation.host_numbers import (
    Counter,
    Expression,
    Guard,
    HostNumber,
    Now,
    plain_number,
    refuse_if_new_at_each_step,
)
from steploop.compilation.leaves import Place, counted_on_host, with_tensors
from steploop.compilation.optimizer_calls import TensorScalars
from steploop.compilation.traced_state import Owner, TracedState, earlier_class, results_of, traced_class
from steploop.core.schedules import Rates, Schedule
from steploop.core.state.copying import carry_hooks
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import InFlight
from steploop.core.state.train_state import TrainState
from steploop.core.steps.set_rates import Schedules, values_at
from steploop.errors import CompileError

__all__ = ["MOST_GRAPHS", "StepTrace"]

MOST_GRAPHS = (
    8  # for one form of batch: a number that takes more values than this is not worth a graph for each
)
_SPARE_VALUES = 64  # places for the numbers that a step computes with


class StepTrace:
    """One run of a train step on fake tensors, and the values that the host computes.

    Args:
        states: name -> state that it is made for.
        numbers: of the batch.
        cycled: whether the momentum is an input of the graph, because a schedule sets it.
        fixed: whether the numbers of the batch, seed and epoch are built in, and the graph holds for these only.
    """

    def __init__(
        self, states: Mapping[str, TrainState], numbers: Sequence[Any], *, cycled: bool, fixed: bool
    ) -> None:
        self.states = states
        self.cycled = cycled
        self.fixed = fixed
        self.on_host = all(map(counted_on_host, states.values()))
        self.guards: list[Guard] = []
        self.scalars = TensorScalars()
        self.values: list[Expression] = []
        self.vector: Tensor | None = None
        self.before: dict[str, list[Schedules]] = {name: [] for name in states}
        self.after: dict[str, list[Schedules]] = {name: [] for name in states}
        self.limits: dict[str, int] = {}
        self.cycles_momentum = False
        self.results_read: set[tuple[str, str]] = set()
        self.events = Events(next(iter(states.values())).device, list(states))
        self.owners = {
            name: Owner(self, name, index, state) for index, (name, state) in enumerate(states.items())
        }
        self._now = Now(list(states.values()), numbers, [True] * len(states))
        self._kept: list[Tensor] = []  # their ids are keys, which must not be used again
        self._finite: dict[int, Tensor] = {}
        self._open = True

    def size(self) -> int:
        """The number of values that the host may write."""
        return _SPARE_VALUES + sum(2 * len(s.hyper) + 1 for s in self.states.values())

    def close(self) -> None:
        """End the trace: what is left of its numbers keeps the values of this step."""
        self._open = False

    # -- numbers -------------------------------------------------------------------------------------------------

    def look(self, number: HostNumber) -> Any:
        """The value of a number at this step."""
        return number.read(self._now)

    def note(self, number: HostNumber) -> Any:
        """The value of a number at this step; the graph will be run only while it has this value."""
        value = number.read(self._now)
        if self._open:
            if not isinstance(value, bool) and self.on_host:
                refuse_if_new_at_each_step(number, self._now, MOST_GRAPHS + 1)
            self.guards.append(Guard(number.read, value, number.after, number.name))
        return value

    def note_value(self, read: Callable[[], Any], value: Any) -> None:
        """Note a value that Python read of a tensor of the surroundings."""
        self.guards.append(Guard(lambda _: read(), value, frozenset(), "a tensor of the surroundings"))

    def tensor(self, number: HostNumber, dtype: torch.dtype) -> Tensor:
        """The number as an input that the host fills at each step."""
        if not number.after:
            return self._number(number.read, dtype)
        # what depends on the step being taken is known when the graph has run: both are fed
        read, index = number.read, max(number.after)
        taken = self._number(read, dtype)
        skipped = self._number(lambda now: read(_assuming(now, index, finite=False)), dtype)
        return torch.where(self._finite[index], taken, skipped)

    def _number(self, read: Expression, dtype: torch.dtype = torch.float64) -> Tensor:
        if self.vector is None or len(self.values) == self.vector.numel():
            raise CompileError(
                f"asks the host for more than {_SPARE_VALUES} numbers that depend on the step. Use fewer."
            )
        number = self.vector[len(self.values)].to(dtype)
        self.values.append(read)
        value = HostNumber(self, read, "a hyperparameter")
        self.scalars.values[id(number)] = value if self.on_host else float(read(self._now))
        self._kept.append(number)
        return number

    def batch_numbers(self, count: int) -> list[Any]:
        """Stand-ins for the numbers of the batch."""
        numbers = [HostNumber(self, _nth(i), "a number of the batch") for i in range(count)]
        return [plain_number(n) for n in numbers] if self.fixed else numbers

    # -- what step functions ask of a trace ------------------------------------------------------------------

    def schedule(self, state: Any, learning_rate: Schedules) -> Any:
        """Leave the schedule to the host: before the graph, or after it if the optimizer has stepped."""
        count: Counter = state.attempted_steps
        owner: Owner = count.owner
        # run once here: what it reads of the traced state is noted, and what it raises has the user's line
        step = int(self.states[owner.name].step) + count.offset
        values = values_at(state.machine, learning_rate, step)
        if any(value is not None and value[1] is not None for value in values):
            self.cycles_momentum = True
        if any(issubclass(type(number), HostNumber) for value in values if value for number in value):
            if isinstance(learning_rate, Mapping):
                learning_rate = {group: _plain(function) for group, function in learning_rate.items()}
            else:
                learning_rate = _plain(learning_rate)
            values_at(state.machine, learning_rate, step)
        (self.after if count.offset else self.before)[owner.name].append(learning_rate)
        return state

    def value_at_step(self, state: Any, function: Callable[[int], float]) -> Tensor:
        """Make a number that the host computes from the steps taken, this one included if taken."""
        count: Counter = state.attempted_steps
        offset, index = count.offset, count.owner.index
        return self._number(lambda now: float(function(now.states[index].step + offset)))

    def limit_nonfinite(self, state: Any, limit: int) -> None:
        """Record the limit; the host counts."""
        self.limits[state.attempted_steps.owner.name] = limit

    def generators(self, state: Any) -> TracedGenerators:
        """Note where the passes of a state seed."""
        return TracedGenerators(self.events, state.attempted_steps.owner.name)

    def counts(self, state: Any, finite: Tensor) -> dict[str, Any]:
        """The counters after a step: the host's numbers, or tensors where the device counts."""
        owner: Owner = state.attempted_steps.owner
        self._finite[owner.index] = finite
        if not self.on_host:
            ones = finite.long()
            return {
                "applied_steps": state.applied_steps + ones,
                "nonfinite_steps": (state.nonfinite_steps + 1) * (1 - ones),
            }
        index, after = owner.index, frozenset({owner.index})

        def applied(now: Now) -> int:
            return int(now.states[index].applied_steps) + now.finite[index]

        def nonfinite(now: Now) -> int:
            return 0 if now.finite[index] else now.states[index].nonfinite_steps + 1

        return {
            "applied_steps": HostNumber(self, applied, f"{owner.prefix}.step", after),
            "nonfinite_steps": HostNumber(self, nonfinite, f"{owner.prefix}.nonfinite_steps", after),
        }

    def finite(self, owner: Owner) -> bool:
        """True, noted: where the step is not finite the host takes it back and repeats it in eager."""
        index = owner.index
        number = HostNumber(
            self, lambda now: now.finite[index], f"{owner.prefix}.finite", frozenset({owner.index})
        )
        return bool(number)

    # -- the traced states -----------------------------------------------------------------------------------

    def _hyper(self, owner: Owner) -> tuple[dict[str, Any], ...]:
        """Return the hyperparameters; those that a schedule sets are inputs of the graph."""
        state = owner.real
        double = any(p.dtype == torch.float64 for p in state.tensors.params.values())
        dtype = torch.float64 if double else torch.float32
        groups = []
        for index, group in enumerate(state.hyper):
            traced = dict(group)
            if group.get("lr") is not None:
                traced["lr"] = self._number(_rate_reader(owner.index, index), dtype)
            if self.cycled and "betas" in group:
                first = self._number(owner.expression(_reader(index, "betas")), dtype)
                traced["betas"] = (first, *group["betas"][1:])
            elif self.cycled and "momentum" in group:
                traced["momentum"] = self._number(owner.expression(_reader(index, "momentum")), dtype)
            own = state.machine.optimizer.param_groups[index]
            if "capturable" in own:
                traced["capturable"] = True  # step counts stay tensors
            if "foreach" in own:
                traced["foreach"] = state.device.type != "cpu"
            if "fused" in own:
                traced["fused"] = False  # fusing is the compiler's work
            groups.append(traced)
        return tuple(groups)

    def traced(
        self,
        owner: Owner,
        tensors: Mapping[Place, Tensor],
        counters: Mapping[str, Tensor],
        results: Mapping[str, Sequence[Tensor]],
    ) -> TracedState:
        """Make the state ``owner`` over these fake tensors."""
        state = owner.real
        for name, param in state.tensors.params.items():
            fake = tensors["params", (name,)]
            carry_hooks(param, fake)
            if isinstance(param, torch.nn.Parameter):
                fake._is_param = True  # what isinstance(fake, Parameter) asks for
        scale = state.scale
        if scale is not None:
            factor = (
                self._number(owner.expression(_scale), torch.float32) if self.on_host else counters["scale"]
            )
            scale = attrs.evolve(scale, scale=factor, growth_tracker=counters["growth_tracker"])
        kind: Any = type(state)
        traced = object.__new__(traced_class(kind))
        traced.__dict__.update(state.__dict__)
        counts: dict[str, Any] = {key: counters[key] for key in ("applied_steps", "nonfinite_steps")}
        if self.on_host:
            counts = {
                "applied_steps": owner.number("step", lambda real: real.applied_steps),
                "nonfinite_steps": owner.number("nonfinite_steps", lambda real: real.nonfinite_steps),
            }
        if self.fixed:
            for field in ("seed", "epoch"):
                traced.__dict__[field] = owner.note(field, _field_reader(field))
        traced.__dict__.update(
            tensors=with_tensors(state, tensors),
            flight=self._earlier(owner, results),
            lease=Lease(),
            generation=0,
            hyper=self._hyper(owner),
            scale=scale,
            attempted_steps=Counter(self, owner.expression(_attempted), f"{owner.prefix}.attempted_steps", owner),
            batch=Counter(self, owner.expression(_batch), f"{owner.prefix}.batch", owner),
            **counts,
        )  # fmt: skip
        return traced

    def _earlier(self, owner: Owner, results: Mapping[str, Sequence[Tensor]]) -> InFlight:
        """The results of the step before: tensors and numbers are inputs, the rest is noted when it is read."""
        real = owner.real.flight
        kind: Any = type(real)
        flight: Any = object.__new__(earlier_class(kind))
        values = {}
        for field in results_of(real):
            value = getattr(real, field)
            if field in results:
                count = len(flatten(value)[2])
                read = _result_reader(owner.index, field)
                numbers = [HostNumber(self, _part(read, i), f"{owner.prefix}.{field}") for i in range(count)]
                value = rebuild(value, results[field], numbers)
            values[field] = value
        flight.__dict__.update(real.ended().__dict__ | values)
        flight.__dict__["note"] = lambda field: self._note_result(owner, field, known=field in results)
        return flight  # type: ignore[no-any-return]

    def _note_result(self, owner: Owner, field: str, *, known: bool) -> None:
        if not known:
            raise CompileError(
                f"reads {owner.prefix}.{field}, in which the step before has left what is no tensor, number or text."
            )
        if self._open and (owner.name, field) not in self.results_read:
            self.results_read.add((owner.name, field))
            read = _result_reader(owner.index, field)
            self.guards.append(
                Guard(lambda now: read(now)[1], read(self._now)[1], frozenset(), f"{owner.prefix}.{field}")
            )


def _assuming(now: Now, index: int, *, finite: bool) -> Now:
    return Now(now.states, now.numbers, [finite if i == index else f for i, f in enumerate(now.finite)])


def _plain(function: Schedule) -> Schedule:
    """The schedule with its numbers as they were when it was traced."""

    def plain(step: int) -> Any:
        value: Any = function(step)
        if isinstance(value, Rates):
            return Rates(plain_number(value.learning_rate), plain_number(value.momentum))
        return plain_number(value)

    return plain


def _nth(index: int) -> Expression:
    return lambda now: now.numbers[index]


def _result_reader(index: int, field: str) -> Expression:
    return lambda now: flatten(getattr(now.states[index].flight, field))


def _part(read: Expression, index: int) -> Expression:
    return lambda now: read(now)[2][index]


def _reader(index: int, key: str) -> Callable[[TrainState], Any]:
    if key == "betas":
        return lambda state: state.hyper[index]["betas"][0]
    return lambda state: state.hyper[index][key]


def _rate_reader(owner: int, group: int) -> Expression:
    return lambda now: now.states[owner].hyper[group]["lr"]


def _field_reader(field: str) -> Callable[[TrainState], Any]:
    return lambda state: getattr(state, field)


def _attempted(state: TrainState) -> int:
    return state.attempted_steps


def _batch(state: TrainState) -> int:
    return state.batch


def _scale(state: TrainState) -> Any:
    return state.scale.scale if state.scale is not None else 1.0
