"""A train step on ranks with compiled passes, and the choice between it and the eager one, which ranks make together."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from steploop.compilation.auto_choice import measure
from steploop.compilation.part_compiler import PartCompiler
from steploop.core.ranks import Ranks
from steploop.core.state.train_state import TrainState
from steploop.core.steps.by_parts.part_passes import computed_by
from steploop.errors import CompileError

__all__ = ["PASSES_ONLY", "StepOfParts"]

PASSES_ONLY = "compiling was asked for; of a step with ranks the passes are compiled, the rest is eager"


class StepOfParts:
    """Takes ``train_step`` with compiled passes.

    Args:
        train_step: as it was written.
        mode: "auto": what cannot be compiled is computed in eager.
        compiled: is called after each compilation.
    """

    def __init__(
        self,
        train_step: Callable[[Any, Any], Any],
        mode: Literal[True, "auto"],
        compiled: Callable[[str, float], object],
    ) -> None:
        self._train_step = train_step
        self._compiler = PartCompiler(required=mode is True, compiled=compiled)

    def __call__(self, state: Any, states: Sequence[TrainState], batch: Any) -> Any:
        """Take a step."""
        if any(one.machine.module.sharded is not None for one in states):
            raise CompileError(
                "A step of a model under fully_shard cannot be compiled: its hooks gather each layer's parameters in Python. Run it "
                "in eager, or train whole parameters (without fully_shard)."
            )
        # a compiled backward pass never writes into buffers, an eager one of the same model may
        known = [(one.machine, one.machine.recomputes) for one in states]
        try:
            with computed_by(self._compiler):
                return self._train_step(state, batch)
        finally:
            for machine, recomputes in known:
                machine.recomputes = recomputes

    def measured(
        self, state: Any, states: Sequence[TrainState], batch: Any
    ) -> tuple[dict[str, float] | None, str | None]:
        """Time both forms on clones, as all ranks do at this step.

        Returns:
            Microseconds of each on rank 0, if they were measured, and why all go on in eager; None where compiled is faster.
        """
        ranks = next(one.ranks for one in states if one.ranks is not None)
        if any(one.machine.module.sharded is not None for one in states):
            return None, "a step of a model under fully_shard cannot be compiled"

        def compiled(one: Any, batch: Any) -> Any:
            return self(one, [one] if isinstance(one, TrainState) else list(one.values()), batch)

        took = measure({"eager": self._train_step, "compiled": compiled}, state, batch, _agreed(ranks))
        refused = next(iter(self._compiler.refused.values()), None)
        told = ranks.gather_objects((took, refused))
        took = told[0][0]
        refused = next((why for _, why in told if why is not None), None)
        if refused is not None:
            return took, f"a pass cannot be compiled: {refused}"
        figures = f"{took['compiled']:.0f} us a step compiled, {took['eager']:.0f} us in eager"
        return took, None if took["compiled"] < took["eager"] else f"measured: {figures}"


def _agreed(ranks: Ranks) -> Callable[[int], int]:
    return lambda steps: int(ranks.broadcast_object(steps))
