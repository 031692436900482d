"""The results of a population's step: stacked as the graph gave them, and each member's when they are asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import Build, Reference, builder, renumbered
from steploop.compilation.plans import StatePlan

__all__ = ["StepResults"]


class StepResults:
    """What one step has left in flight.

    Args:
        plans: of each member.
        where: for each reference of the plans, where its value stands: among ``given``, and then among ``computed``.
        given: tensors with a first axis of members.
        computed: for each member, numbers of the host.
        ended: index -> results of a member that took no step.
        finite: for each member, whether its step was.
        builds: what builds each tree from the values, known from steps before; looked up by the identity of its template.
    """

    def __init__(
        self,
        plans: Sequence[StatePlan],
        where: Sequence[int],
        given: Sequence[Tensor],
        computed: Sequence[Sequence[Any]],
        ended: Mapping[int, dict[str, Any]],
        *,
        finite: Sequence[bool],
        builds: dict[int, Build],
    ) -> None:
        self._plans = plans
        self._where = where
        self._given = given
        self._computed = computed
        self._finite = finite
        self._ended = ended
        self._builds = builds
        self._parts: list[Sequence[Tensor]] | None = None

    def _built(self, template: Any, values: Sequence[Any]) -> Any:
        build = self._builds.get(id(template))  # the plan, which lives as long, holds the template
        if build is None:
            build = builder(renumbered(template, lambda i: Reference(self._where[i])))
            self._builds[id(template)] = build
        return build(values)

    def field(self, name: str) -> Any:
        """A field in flight, with a first axis of members."""
        template = self._plans[0].flight.get(name)
        numbers = [torch.tensor(each) for each in zip(*self._computed, strict=True)]
        return self._built(template, [*self._given, *numbers])

    def member(self, index: int) -> dict[str, Any]:
        """The fields in flight of one member."""
        if index in self._ended:
            return self._ended[index]
        plan = self._plans[index]
        if self._parts is None:  # for all members at once: whoever asks for one mostly asks for all
            self._parts = [t.unbind(0) for t in self._given]
        values = [*(parts[index] for parts in self._parts), *self._computed[index]]
        fields = {name: self._built(template, values) for name, template in plan.flight.items()}
        if plan.attempts:
            fields["finite"] = self._finite[index]
        return fields
