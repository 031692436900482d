"""The results of a population's step: stacked as the graph gave them, and each member's when they are asked for."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steploop.compilation.flattening import Build, Reference, builder, renumbered
from steploop.compilation.plans import StatePlan

__all__ = ["Form", "StepResults"]

# fields that are one value each, and fields that are trees of values
Form = tuple[list[tuple[str, int]], list[tuple[str, Build]]]


class StepResults:
    """What one step has left in flight.

    Args:
        plans: of each member.
        where: for each reference of the plans, where its value stands: among ``given``, and then among ``computed``.
        given: tensors with a first axis of members.
        computed: for each member, numbers of the host.
        ended: index -> results of a member that took no step.
        finite: for each member, whether its step was.
        forms: how the fields are made of the values, known from steps before; looked up by the identity of the plan.
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
        forms: dict[int, Form],
    ) -> None:
        self._plans = plans
        self._where = where
        self._given = given
        self._computed = computed
        self._finite = finite
        self._ended = ended
        self._forms = forms
        self._rows: list[tuple[Tensor, ...]] | None = None

    def _form(self, index: int) -> Form:
        """How the fields of a member are made of the values; looked up for each plan once."""
        plan = self._plans[index]
        form = self._forms.get(id(plan))  # the graph, which lives as long, holds the plan
        if form is None:
            flight, where = plan.flight, self._where
            direct = [(name, where[t.index]) for name, t in flight.items() if isinstance(t, Reference)]
            built = [
                (name, builder(renumbered(t, lambda i: Reference(where[i]))))
                for name, t in flight.items()
                if not isinstance(t, Reference)
            ]
            form = self._forms[id(plan)] = direct, built
        return form

    def field(self, name: str) -> Any:
        """A field in flight, with a first axis of members."""
        values = [*self._given, *(torch.tensor(each) for each in zip(*self._computed, strict=True))]
        direct, built = self._form(0)
        for known, index in direct:
            if known == name:
                return values[index]
        return next((build(values) for known, build in built if known == name), None)

    def member(self, index: int) -> dict[str, Any]:
        """The fields in flight of one member."""
        if index in self._ended:
            return self._ended[index]
        if self._rows is None:
            # all members at once: whoever asks for one mostly asks for each, and t[index] costs more than the rest
            self._rows = list(zip(*(t.unbind(0) for t in self._given), strict=True))
        values = [*self._rows[index], *self._computed[index]]
        direct, built = self._form(index)
        fields = {name: values[place] for name, place in direct}
        for name, build in built:
            fields[name] = build(values)
        if self._plans[index].attempts:
            fields["finite"] = self._finite[index]
        return fields
