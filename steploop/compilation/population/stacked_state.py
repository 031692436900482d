"""A population: states of one shape as one value, their tensors stacked; ``stack`` and ``unstack``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from steploop.compilation.flattening import flatten, rebuild
from steploop.compilation.leaves import Place
from steploop.compilation.population.running_members import RunningMembers
from steploop.compilation.population.stacked_tensors import check_alike, parts_of, stacked_from
from steploop.core.state.ownership import Lease
from steploop.core.state.parts import result_names
from steploop.core.state.train_state import TrainState
from steploop.errors import SpentStateError

__all__ = ["Population", "Results", "stack", "stack_members", "unstack"]


class Results(Protocol):
    """What a step of a population has left."""

    def field(self, name: str) -> Any:
        """A field in flight, with a first axis of members."""
        ...

    def member(self, index: int) -> dict[str, Any]:
        """The fields in flight of one member."""
        ...


class Population:
    """Several train states of one shape as one value: made by ``steploop.stack``, stepped by ``steploop.vmap``.

    Its members are ordinary states: ``len(population)``, ``population[i]`` and iteration give copies of them. Like a
    state, a population is immutable, and a step spends the one that it was given.

    Attributes:
        ended: for each member that takes no more steps, why; None for the others. A member ends by its
            ``early_stopping``, or by too many steps in a row that were not finite.

    Example:
        >>> population = steploop.stack([state, state.clone()])
        >>> len(population), population[1].step
        (2, 0)
    """

    def __init__(
        self,
        members: Sequence[TrainState] | RunningMembers,
        tensors: Mapping[Place, Tensor] | None,
        *,
        results: Results | None = None,
        ended: Sequence[str | None] = (),
        lease: Lease | None = None,
        values: object = None,
    ) -> None:
        self._running = members if isinstance(members, RunningMembers) else None
        states = members.states if isinstance(members, RunningMembers) else members
        self.ended = tuple(
            [
                why
                or ("early stopping" if m.early_stopping is not None and m.early_stopping.stopped else None)
                for m, why in zip(states, ended or [None] * len(states), strict=True)
            ]
        )
        self.lease = lease or Lease()
        self.generation = self.lease.generation
        self._count = len(states)
        # those that somebody has asked for, or has given; the others are made when they are asked for
        self._views: dict[int, TrainState] = {} if self._running is not None else dict(enumerate(states))
        self._tensors = tensors
        self._results = results
        self.values = values or object()  # populations with one of these differ in cursors and folds only

    # -- what a step needs -------------------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[TrainState, ...]:
        """The states; their tensors are parts of ``tensors``, and their results in flight are left out."""
        return tuple(map(self._view, range(self._count)))

    def _view(self, index: int) -> TrainState:
        view = self._views.get(index)
        if view is None:
            if (
                self.generation != self.lease.generation
            ):  # the other views need no look, at the making of each
                self.check_alive("a member")
            view = self._views[index] = self.running.view(index)
        return view

    @property
    def running(self) -> RunningMembers:
        """The values of the members, which the next step changes in place."""
        if self._running is None:
            self._running = RunningMembers(self.members)
        return self._running

    def tear(self) -> None:
        """Take the tensors from this population: an update begins. Who holds a view of a member must not read it in there."""
        self.lease.tear()
        for view in self._views.values():
            view.lease.tear()

    def hand_on(self, spender: str) -> None:
        """End the update: the next population has the tensors."""
        self.lease.hand_on(spender)
        for view in self._views.values():
            view.lease.hand_on(spender)

    @property
    def tensors(self) -> Mapping[Place, Tensor] | None:
        """Place -> stacked tensor; None while some members have slots and others have none."""
        return self._tensors

    @property
    def results(self) -> Results | None:
        """What the last step has left."""
        return self._results

    def member(self, index: int) -> TrainState:
        """The state at an index with its results, over its parts of the stacked tensors.

        It is a view: the population's next step spends it, and a step that it takes by itself spends the population.
        """
        state = self._view(index)
        if self._results is None:
            return state
        return state.replace(flight=state.flight.replace(**self._results.member(index)))

    def going_on(self, states: Sequence[TrainState], ended: Sequence[str | None]) -> "Population":
        """This population after something was noted in its members: a cursor, what an evaluation has decided.

        Args:
            states: made of ``member(i)`` by changes of plain values. Where rates were changed too, all is stacked anew.
            ended: for each member that takes no part in the next step, why.
        """
        members = self.members
        noted = all(
            one.tensors is mine.tensors
            and one.alive
            and one.hyper is mine.hyper
            and one.scale is mine.scale
            and one.precision is mine.precision
            and one.seed is mine.seed
            for one, mine in zip(states, members, strict=True)
        )
        if not noted or self._tensors is None or not self.alive:
            return stack_members(states, ended)
        return Population(
            [one.replace(flight=m.flight) for one, m in zip(states, members, strict=True)],
            self._tensors, results=self._results, ended=ended, lease=self.lease, values=self.values,
        )  # fmt: skip

    def results_of(self, index: int) -> dict[str, Any]:
        """What the last step of a member has left in flight."""
        flight = self.member(index).flight
        return {name: getattr(flight, name) for name in result_names(type(flight)) if name != "known"}

    @property
    def alive(self) -> bool:
        """Whether the tensors are this population's: no step has updated them in place."""
        return self.generation == self.lease.generation and all(view.alive for view in self._views.values())

    def check_alive(self, use: str) -> None:
        """Raise SpentStateError if a step has updated the tensors."""
        if self.generation != self.lease.generation:
            if self.lease.torn:
                raise SpentStateError(
                    f"{use}: this population is spent: a step was cut off in the middle. Go on from checkpoints of its members."
                )
            raise SpentStateError(
                f"{use}: this population is spent: a step updated its tensors in place and gave them to the population that it "
                "returned. Go on with that one, or keep a copy beforehand with population.clone()."
            )
        for index, view in self._views.items():
            if not view.alive:
                raise SpentStateError(
                    f"{use}: this population is spent: its member {index} was stepped by itself. Stack the states that the steps "
                    "returned."
                )

    # -- members -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of members."""
        return self._count

    def __getitem__(self, index: int) -> TrainState:
        """An ordinary state with the values of one member, as a copy."""
        self.check_alive("population[i]")
        return self.member(range(self._count)[index]).clone()

    def __iter__(self) -> Iterator[TrainState]:
        """Every member, as ``population[i]`` gives it."""
        return (self[index] for index in range(self._count))

    def clone(self) -> "Population":
        """A copy that shares no tensor with this one."""
        return stack_members(list(self), self.ended)

    def map(self, function: Callable[[TrainState], TrainState]) -> "Population":
        """A population of what a function makes of every member: the next epoch, early stopping, another rate.

        The function is given copies of the members; this population stays whole.

        Example:
            >>> population = population.map(lambda state: attrs.evolve(state, epoch=state.epoch + 1, batch=0))
        """
        return stack_members([function(state) for state in self], self.ended)

    # -- results of the last step --------------------------------------------------------------------------------------

    @property
    def loss(self) -> Tensor | None:
        """The losses of the last step, shape (members,); None before the first."""
        return self._result("loss")  # type: ignore[no-any-return]  # it is stacked

    @property
    def outputs(self) -> Any:
        """What the objective gave besides the losses, with a first axis of members."""
        return self._result("outputs")

    @property
    def grad_norm(self) -> Tensor | None:
        """The norms of the gradients before clipping, shape (members,)."""
        return self._result("grad_norm")  # type: ignore[no-any-return]  # it is stacked

    @property
    def finite(self) -> Tensor | None:
        """Which members had finite gradients, shape (members,), bool."""
        return self._result("finite")  # type: ignore[no-any-return]  # it is stacked

    def _result(self, field: str) -> Any:
        self.check_alive(field)
        if self._results is not None:
            return self._results.field(field)
        return _stacked_tree([getattr(m.flight, field) for m in self.members])

    def __repr__(self) -> str:
        """What a log line needs."""
        spent = self.generation != self.lease.generation
        kind = f"{len(self)} states of {type(self.running.states[0].machine.model).__name__}"
        if spent:  # the counts have gone on with the tensors
            return f"Population({kind}) (spent)"
        steps = sorted({int(m.applied_steps) for m in self.running.states})
        return f"Population({kind}, step={steps[0] if len(steps) == 1 else f'{steps[0]} to {steps[-1]}'})"


def _stacked_tree(values: Sequence[Any]) -> Any:
    """Trees of one structure as one, whose tensors and numbers have a first axis of members; None for different ones."""
    if values[0] is None:
        return None
    if isinstance(values[0], (bool, float)):
        return torch.tensor(values)
    found = [flatten(value) for value in values]
    if any(key != found[0][1] for _, key, _ in found):
        return None
    numbers = [torch.tensor(each) for each in zip(*(one[2] for one in found), strict=True)]
    return rebuild(
        values[0], [torch.stack(each) for each in zip(*(one[0] for one in found), strict=True)], numbers
    )


def stack_members(states: Sequence[TrainState], ended: Sequence[str | None] = ()) -> Population:
    """A population of these states: copies of their values.

    Raises:
        ConfigError: says what of which member differs from the first.
    """
    if not check_alike(states):
        return Population([state.clone() for state in states], None, ended=ended)
    tensors = stacked_from(states)
    hypers: list[Any] = []
    for state in states:  # equal ones are one object, so that a schedule is asked once for all
        hypers.append(next((h for h in hypers if h == state.hyper), state.hyper))
    states = [state.replace(hyper=hyper) for state, hyper in zip(states, hypers, strict=True)]
    return Population(parts_of(states, tensors), tensors, ended=ended)


def stack(states: Sequence[TrainState]) -> Population:
    """Make a population of states of one shape; they stay whole.

    Args:
        states: of one model's shape and one class of optimizer. Their values, seeds, rates, other hyperparameters,
            counters and loss scales are each one's own.

    Raises:
        ConfigError: they cannot be one population; says what of which member differs from the first.

    Example:
        >>> states = [TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=lr)) for lr in (0.1, 0.2)]
        >>> len(stack(states))
        2
    """
    return stack_members(list(states))


def unstack(population: Population) -> list[TrainState]:
    """Every member of a population as an ordinary state of its own; the population stays whole.

    Example:
        >>> state = TrainState.create(torch.nn.Linear(2, 1), steploop.Optimizer(torch.optim.SGD, lr=0.1))
        >>> [one.learning_rate for one in unstack(stack([state, state.clone()]))]
        [0.1, 0.1]
    """
    return list(population)
