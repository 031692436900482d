"""Short runs of any kind, for laws: a loop is a description that prints itself, and makes its state, batches and step."""

from typing import Any

import attrs
from hypothesis import strategies as st
from state_helpers import take_step

from steploop import (
    accumulate,
    backward_scaled,
    forward_loss,
    schedule,
    unscale_and_clip,
    update_ema,
)
from steploop.testing import split, strategies
from steploop.testing.strategies import Task, classification


@attrs.frozen
class Loop:
    """Every step function in its place, as in a recipe."""

    task: Task
    optimizer: Any
    options: dict[str, Any]
    batches_of: list[tuple[int, int]]
    rate: Any
    bound: tuple[str, float]
    accumulated: bool

    @property
    def state(self):
        return self.task.state(self.optimizer, **self.options)

    @property
    def batches(self):
        return [self.task.batch(index, size) for index, size in self.batches_of]

    def gradients(self, state, batch):
        if self.accumulated:
            size = len(batch[0])
            state = accumulate(state, split(batch, [2, size - 2] if size > 3 else [size]), classification)
        else:
            state = backward_scaled(forward_loss(state, batch, classification))
        return unscale_and_clip(state, **dict([self.bound]))

    def step(self, state, batch, *, donate=True):
        state = take_step(state, lambda s: self.gradients(s, batch), donate=donate)
        if state.ema is not None:
            state = update_ema(state, decay=0.9)
        return schedule(state, self.rate)


@st.composite
def loops(draw, **parts):
    task = draw(strategies.tasks(**parts))
    return Loop(
        task=task,
        optimizer=draw(strategies.optimizers(task.model())),
        options={
            "seed": draw(st.integers(0, 2**63 - 1)),
            "precision": draw(st.sampled_from(["fp32", "bf16", "fp16"])),
            "ema": draw(st.booleans()),
        },
        batches_of=draw(st.lists(st.tuples(st.integers(0, 99), st.integers(2, 6)), min_size=1, max_size=3)),
        rate=draw(strategies.schedules(momentum=False)),
        bound=draw(
            st.sampled_from([("max_norm", 1.0), ("max_norm", 1e9), ("max_value", 0.01), ("adaptive", 0.1)])
        ),
        accumulated=draw(st.booleans()),
    )
