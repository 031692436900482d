"""Trace the steps of members: one trace for those that are alike, and what differs between the others' graphs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import attrs
from torch import nn

from steploop.compilation.baked import Baked
from steploop.compilation.capture import trace_step
from steploop.compilation.cpu_libraries import without_mkldnn
from steploop.compilation.diagnosis import diagnosed
from steploop.compilation.flattening import Flat
from steploop.compilation.graph_outputs import SlotsGrew
from steploop.compilation.host_numbers import Now
from steploop.compilation.leaves import constants_of, signature
from steploop.compilation.plans import StepPlan
from steploop.compilation.population.graph_parts import Inputs
from steploop.compilation.population.likeness import likeness_of
from steploop.compilation.population.literals import Literal, differing_literals
from steploop.core.state.train_state import TrainState
from steploop.errors import CompileError, ConfigError, ObjectiveError, StepOrderError

__all__ = ["MemberTrace", "MemberTraces", "TrainStep", "differences", "holds"]

TrainStep = Callable[[Any, Any], Any]
# A weight decay that multiplies to nothing: with 0 an optimizer leaves the call out, which is another graph. Its
# product with any number that float32 or float64 can hold is 0.
_AS_GOOD_AS_ZERO = 5e-324


@attrs.frozen(eq=False)
class MemberTrace:
    """The traced step of a member, which holds for every member that is like it.

    Attributes:
        plan: its graph, and what the host does.
        baked: what Python read besides.
        like: what members have to be like: of the train step, the model and the batch.
        state: signature of the state, without its machine.
        constants: the hyperparameters that stand in the graph.
        guards: what Python decided.
    """

    plan: StepPlan
    baked: Baked
    like: Any
    state: Any
    constants: Any
    guards: Sequence[tuple[Any, Any]]


def holds(trace: MemberTrace, state: TrainState, numbers: Sequence[Any]) -> bool:
    """Whether Python would decide for this member what it decided when this was traced."""
    if not trace.guards:
        return True
    now = Now([state], numbers, [True])
    try:
        return all(read(now) == value for read, value in trace.guards)
    except Exception:  # noqa: BLE001  (a division by 0, a table that ends: then Python decides something else)
        return False


class MemberTraces:
    """The traces of a train step of a population."""

    def __init__(self) -> None:
        self._traces: list[MemberTrace] = []

    def of(
        self,
        steps: Sequence[TrainStep],
        states: Sequence[TrainState],
        batches: Sequence[Any],
        flats: Sequence[Flat],
    ) -> list[MemberTrace]:
        """The trace of each member; new ones are made for members that are unlike all others.

        Args:
            steps: of each member.
            states: the members.
            batches: of each member.
            flats: the batches as ``flatten`` gives them.

        Raises:
            CompileError: the step of a member cannot be captured; the line, and what to write instead.
            SlotsGrew: the optimizer has not made all of its slots.
        """
        found = []
        known: dict[int, Any] = {}
        for step, state, batch, flat in zip(steps, uniform(states), batches, flats, strict=True):
            for part in (step, state.machine.model):
                if id(part) not in known:
                    known[id(part)] = likeness_of(part)
            like = (known[id(step)], known[id(state.machine.model)], flat[1])
            trace = next((t for t in self._traces if _fits(t, like, state, flat[2])), None)
            if trace is None:
                trace = self._trace(step, state, batch, flat, like)
                self._traces.append(trace)
            found.append(trace)
        return found

    def _trace(self, step: TrainStep, state: TrainState, batch: Any, flat: Flat, like: Any) -> MemberTrace:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        model = state.machine.model
        baked = Baked(step, [model])
        recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
        try:
            # the fused kernels have no batching rule: of attention, and of a recurrent layer on a CPU
            with sdpa_kernel([SDPBackend.MATH]), without_mkldnn() if recurrent else nullcontext():
                plan = trace_step(step, {"": state}, batch, flat, baked, drawn_outside=True)
        except (SlotsGrew, ConfigError, ObjectiveError, StepOrderError):
            raise
        except Exception as error:
            raise diagnosed(error) from error
        _check(plan)
        return MemberTrace(
            plan, baked, like, signature(state)[1:], constants_of(state.hyper, cycled=plan.cycled),
            [(guard.read, guard.value) for guard in plan.guards],
        )  # fmt: skip


def uniform(states: Sequence[TrainState]) -> list[TrainState]:
    """The states for tracing: where some of them decay weights, all do."""
    decays = [any(s.hyper[g].get("weight_decay") for s in states) for g in range(len(states[0].hyper))]
    return [
        state.replace(
            hyper=tuple(
                {**group, "weight_decay": _AS_GOOD_AS_ZERO} if some and group["weight_decay"] == 0 else group
                for group, some in zip(state.hyper, decays, strict=True)
            )
        )
        for state in states
    ]


def _fits(trace: MemberTrace, like: Any, state: TrainState, numbers: Sequence[Any]) -> bool:
    return bool(
        trace.like == like
        and trace.baked.unchanged()
        and trace.state == signature(state)[1:]
        and trace.constants == constants_of(state.hyper, cycled=trace.plan.cycled)
        and holds(trace, state, numbers)
    )


def _check(plan: StepPlan) -> None:
    """Refuse what a single compiled step can do and a population cannot.

    Raises:
        CompileError: names it.
    """
    doubtful = [guard.name for guard in plan.guards if guard.after]
    if doubtful:
        raise CompileError(
            f"This train step cannot be a population's: it decides in Python by {doubtful[0]}, which differs between members. Select "
            "with torch.where(state.finite, a, b)."
        )
    if plan.left:
        raise CompileError(
            f"This train step cannot be a population's: it leaves a tensor in {plan.left[0][1]!r} of a module, which is one for all "
            "members. Return it from the objective, among the outputs."
        )


def differences(
    traces: Sequence[MemberTrace], states: Sequence[TrainState]
) -> tuple[list[Literal], list[int]]:
    """Compare the traces of members.

    Returns:
        The numbers in which their graphs differ, for each distinct trace; and which of those each member has.

    Raises:
        CompileError: the graphs differ in more than numbers; says between which members, and in which hyperparameters.
    """
    distinct = list(dict.fromkeys(map(id, traces)))
    which = [distinct.index(id(trace)) for trace in traces]
    firsts = [which.index(i) for i in range(len(distinct))]
    plans = [traces[i].plan for i in firsts]

    def describe(index: int) -> str:
        member, known = firsts[index], states[0]
        keys = [
            f"{key} of {b[key]!r} beside {a[key]!r}"
            for a, b in zip(known.hyper, states[member].hyper, strict=True)
            for key in a
            if key != "lr" and a[key] != b[key]
        ]
        return f"member {member}" + (f" ({', '.join(dict.fromkeys(keys))})" if keys else "")

    for index, plan in enumerate(plans[1:], 1):
        if _outline(plan) != _outline(plans[0]):
            raise CompileError(
                f"A population computes one graph, but the step of {describe(index)} takes or gives other tensors than that of member "
                "0. Train these members apart."
            )
    try:
        return differing_literals([plan.graph.module.graph for plan in plans], describe), which
    except CompileError as error:
        raise CompileError(f"The step of a population {error}") from None


def _outline(plan: StepPlan) -> Any:
    """What has to be the same for members besides their graphs."""
    state = plan.states[""]
    inputs = Inputs([plan], [None] * plan.batch_tensors)
    given = [i for i in plan.graph.outline.wiring.given if i >= 0]
    return (
        inputs.taken, inputs.passed, inputs.written, given, plan.size, len(plan.values), plan.graph.drawn, state.donated,
        state.on_host, state.attempts, state.batches, sorted(state.flight), sorted(state.given),
        sorted(map(repr, state.tensors)), sorted(plan.computed),
    )  # fmt: skip
