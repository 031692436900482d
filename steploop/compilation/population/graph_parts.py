"""What stands at each input of the graph of one member, and of the graph of a population."""

from collections.abc import Sequence
from typing import Any

from steploop.compilation.plans import StepPlan

__all__ = ["Inputs", "Part"]

Part = tuple[Any, ...]  # what stands at an input, by its kind


class Inputs:
    """What stands at each input of the graph of one member, and whether a population's has an axis of members there.

    Args:
        plans: of each member.
        batch_dims: 0 or None for each tensor of the batch.

    Attributes:
        taken: of each input: what stands there, and 0 or None.
        passed: the same for inputs that the graph passes through.
        written: what stands at the inputs that the graph writes into.
    """

    def __init__(self, plans: Sequence[StepPlan], batch_dims: Sequence[int | None]) -> None:
        plan = plans[0]
        parts: list[Part] = [("batch", i) for i in range(plan.batch_tensors)]
        parts.append(("numbers",))
        parts += [("place", place) for _, place in plan.order]
        parts += [("counter", name) for _, name in plan.counters]
        parts += [("result", field, which) for _, field, which in plan.results]
        parts += [("constant", i) for i in range(len(plan.graph.constants))]
        parts += [("draw", i) for i in range(plan.graph.drawn)]
        dims: dict[Part, int | None] = dict.fromkeys(parts, 0)
        dims |= {("batch", i): dim for i, dim in enumerate(batch_dims)}
        for i in range(len(plan.graph.constants)):
            if len({id(p.graph.constants[i]) for p in plans}) == 1:
                dims["constant", i] = None
        wiring = plan.graph.outline.wiring
        self.taken = [(parts[i], dims[parts[i]]) for i in wiring.inputs]
        self.passed = [(parts[~i], dims[parts[~i]]) for i in wiring.given if i < 0]
        self.written = [parts[i] for i in sorted(plan.graph.outline.written)]
