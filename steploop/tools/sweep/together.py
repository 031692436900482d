"""Take the steps of members of a sweep as one population; members leave, wait and fail one by one."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from steploop.compilation.flattening import flatten, rebuild
from steploop.compilation.population.stacked_state import Population, stack_members
from steploop.compilation.population.stacked_tensors import stacked
from steploop.compilation.population.vmapped_step import VmappedStep, vmap
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError, ConfigError
from steploop.tools.sweep.member_seats import Seat

__all__ = ["Steps", "Together"]


class Steps:
    """One step of several states as one graph: of a batch that all share, or of one for each.

    Args:
        train_steps: of each state.
    """

    def __init__(self, train_steps: Sequence[Callable[[Any, Any], Any]]) -> None:
        self._shared: VmappedStep = vmap(list(train_steps))
        self._apart: VmappedStep = vmap(list(train_steps), in_dims=0)

    def take(self, population: Population, batches: Sequence[Any]) -> Population | None:
        """The population after the step; None, and nothing is done, where no graph is worth it or the batches are unlike.

        Raises:
            CompileError: it cannot be one graph.
        """
        first, flats = batches[0], [flatten(batch) for batch in batches]
        _, key, numbers = flats[0]
        if any(flat[1] != key or flat[2] != numbers for flat in flats[1:]):
            return None
        each = list(zip(*(flat[0] for flat in flats), strict=True))
        if all(t is same[0] or torch.equal(t, same[0]) for same in each for t in same[1:]):
            return self._shared.by_graph(population, first)
        return self._apart.by_graph(population, rebuild(first, [stacked(same) for same in each], numbers))


class Together:
    """Trains members: those that have taken the fewest steps take one, as a population, until all have ended.

    The others wait, and so those who are at different steps after a resume meet. A member that has ended is masked; once
    fewer than half go on, the population is made anew from them.

    Args:
        seats: the members.
        steps: for all of them, where they were made already.
        report: told what happens, in short sentences.
        ended: told the number of each member that ends, and its exit code.
        show: told the numbers of those that go on.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        steps: Steps | None = None,
        *,
        report: Callable[[str], None],
        ended: Callable[[int, int], None],
        show: Callable[[list[int]], None],
    ) -> None:
        self._seats = list(seats)
        self._crew = list(seats)
        self._steps = steps
        self._population: Population | None = None
        self._gave_up = False
        self._report, self._ended, self._show = report, ended, show

    def run(self) -> None:
        """Train all members to their ends."""
        try:
            for seat in self._seats:
                self._turn(seat)
            while live := [seat for seat in self._seats if seat.code is None]:
                self._round(live)
                self._show([seat.number for seat in live])
        except BaseException as error:
            for seat in self._seats:
                if seat.begun:
                    seat.turn(_raising(error))
            raise

    def _turn(self, seat: Seat, answer: Callable[[], TrainState] | None = None) -> None:
        seat.turn(answer)
        if seat.code is not None:
            self._ended(seat.number, seat.code)

    def _round(self, live: Sequence[Seat]) -> None:
        fewest = min(seat.state.attempted_steps for seat in live)
        going = {seat for seat in live if seat.state.attempted_steps == fewest}
        try:
            new = None if self._gave_up else self._step(going, live)
        except (CompileError, ConfigError) as error:
            self._gave_up, new = True, None
            self._report(f"the members take their steps one by one from here on: {error}")
        except Exception as error:  # noqa: BLE001  (what ends the step of all is the error of each)
            for seat in live:
                self._turn(seat, _raising(error))
            return
        if new is None:
            answers = {seat: seat.alone for seat in live if seat in going}
        else:
            answers = self._answers(new, going)
        for seat, answer in answers.items():
            self._turn(seat, answer)

    def _answers(self, new: Population, going: AbstractSet[Seat]) -> dict[Seat, Callable[[], TrainState]]:
        """What members are given after a step of the population; who waits stands over the new tensors."""
        answers: dict[Seat, Callable[[], TrainState]] = {}
        for index, (seat, ended) in enumerate(zip(self._crew, new.ended, strict=True)):
            if seat.code is not None:
                continue
            view = new.member(index)
            if seat in going and ended is None:
                answers[seat] = _giving(view)
                continue
            seat.state = seat.state.replace(
                tensors=view.tensors, lease=view.lease, generation=view.generation
            )
            if seat in going:  # it ended by steps that were not finite: the last one, taken alone, says so
                answers[seat] = seat.alone
        return answers

    def _step(self, going: AbstractSet[Seat], live: Sequence[Seat]) -> Population | None:
        """The population after a step of these; None where each takes it alone."""
        if len(live) < len(self._crew) and (self._population is None or 2 * len(live) < len(self._crew)):
            self._crew, self._steps, self._population = list(live), None, None
        crew, other = self._crew, next(seat for seat in live if seat in going)
        if self._steps is None:
            self._steps = Steps([seat.own for seat in crew])
        ended = [None if seat in going else "waits" if seat.code is None else "has left" for seat in crew]
        states = [s.state if s.code is None else self._left(i, other) for i, s in enumerate(crew)]
        known = self._population
        population = stack_members(states, ended) if known is None else known.going_on(states, ended)
        new = self._steps.take(population, [(seat if seat in going else other).batch for seat in crew])
        self._population = population if new is None else new
        return new

    def _left(self, index: int, other: Seat) -> TrainState:
        """What stands in the place of a member that has left: its last state, or another's where that is gone."""
        assert self._population is not None  # noqa: S101  (who leaves before the first population is not in it)
        state = self._population.members[index]
        return state if state.alive else other.state


def _giving(state: TrainState) -> Callable[[], TrainState]:
    return lambda: state


def _raising(error: BaseException) -> Callable[[], TrainState]:
    def answer() -> TrainState:
        raise error

    return answer
