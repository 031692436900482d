"""Keep a step that was not finite, with its batch, for a replay.

On the way of a good step stands one comparison. A skipped step changes neither parameters nor slots nor buffers, so
the state before it can be put together after it, out of the tensors of the new state and the plain values of the old.
"""

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor

from steploop.core.precision import on_host
from steploop.core.ranks import Ranks
from steploop.core.state.several import State, members
from steploop.core.state.sharded import is_sharded
from steploop.core.state.train_state import TrainState, read_host
from steploop.errors import CheckpointError, ConfigError
from steploop.runs.capsules.capsule_files import fill_capsule
from steploop.runs.capsules.whole_batch import whole_batch

__all__ = ["CapsuleWriter", "Skipped", "state_before"]


def state_before(before: TrainState, after: TrainState) -> TrainState | None:
    """Rebuild the state before a skipped step; None if its tensors are gone.

    Args:
        before: what went into the train step; spent, unless the step copied.
        after: what came out of it: with one attempted step more, which was not taken.
    """
    if before.alive:
        return before.replace(flight=type(before.flight)())
    if after.attempted_steps != before.attempted_steps + 1 or read_host(after.applied_steps) != read_host(
        before.applied_steps
    ):
        return None  # several optimizer steps, one of which was taken
    return before.replace(
        flight=type(before.flight)(), tensors=after.tensors, lease=after.lease, generation=after.generation
    )


def _was_skipped(state: TrainState, *, wait: bool) -> bool:
    finite = state.finite
    if isinstance(finite, Tensor):
        return (wait or on_host(finite)) and not bool(finite.item())
    return finite is False


@attrs.frozen
class Skipped:
    """A step that was not taken.

    Attributes:
        states: the names of the states that skipped it; "" for the only one.
        capsule: where it was kept, or None.
    """

    states: tuple[str, ...]
    capsule: Path | None


class CapsuleWriter:
    """Writes capsules for a run: the first two, and the newest one.

    Of several skipped steps in a row only the first leaves one: the others begin with the same parameters. An
    overflow under a loss scale while the loss is finite is part of how the scale is found, and leaves one in all.

    Args:
        run_directory: of the run; its config.json and recipe.py are copied.
        phase: which phase of the recipe is trained, from 0.
        report: called with one sentence, once, if a capsule cannot be written: the run goes on.
        most: capsules to keep, >= 1.
        ranks: that train together. All look at each step, and rank 0 keeps it, with the parts of the batch that each has.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        phase: int = 0,
        report: Callable[[str], None] = lambda _: None,
        most: int = 3,
        ranks: Ranks | None = None,
    ) -> None:
        if most < 1:
            raise ConfigError(
                f"CapsuleWriter: most must be >= 1, but is {most!r}. Leave the writer out to keep none."
            )
        self._run = run_directory
        self._folder = run_directory / "capsules"
        self._phase = phase
        self._report = report
        self._most = most
        self._ranks = ranks or Ranks()
        self._row: int | None = None  # attempted steps when the row of skipped ones began
        self._overflow_kept = self._folder.is_dir()

    def after_step(self, before: State, after: State, batch: Any, *, wait: bool = False) -> Skipped | None:
        """Look at a step; keep it if it was skipped.

        Costs one comparison where the host knows that the step was good, and nothing where only the device does.

        Args:
            before: what went into the train step.
            after: what came out of it.
            batch: what it was taken on.
            wait: ask the device too: for the steps after which its numbers are read anyway. The steps in between are
                gone by then, unless they were skipped too.

        Returns:
            None for a step that was taken; else who skipped it, and the capsule if one was written.
        """
        if isinstance(after, TrainState):
            if after.finite is True:  # the way of nearly every step
                return None
            after = {"": after}
        skipped = [name for name, one in after.items() if _was_skipped(one, wait=wait)]
        if not skipped:
            return None
        # rank 0 decides: what is in the directory may be seen later elsewhere
        wanted = self._ranks.broadcast_object(self._wanted([after[name] for name in skipped]))
        path = self._kept(members(before), dict(after), skipped, batch) if wanted else None
        return Skipped(tuple(skipped), path)

    def _wanted(self, skipped: list[TrainState]) -> bool:
        """Whether this skipped step is one to keep; remembers that it came by."""
        row = skipped[0].attempted_steps - read_host(skipped[0].nonfinite_steps)
        if row == self._row:
            return False
        self._row = row
        if any(
            one.scale is None or (one.loss is not None and not math.isfinite(one.loss.item()))
            for one in skipped
        ):
            return True
        first, self._overflow_kept = not self._overflow_kept, True
        return first

    def _kept(
        self, before: dict[str, TrainState], after: dict[str, TrainState], skipped: list[str], batch: Any
    ) -> Path | None:
        """Write a capsule, on rank 0; its path on all."""
        if any(is_sharded(param) for one in after.values() for param in one.tensors.leaves):
            self._report(
                "The step that was not finite is not kept for steploop replay: no rank has the whole model."
            )
            self._report = lambda _: None
            return None
        batch = whole_batch(batch, self._ranks)
        first = self._ranks.rank == 0
        path: Path | None = self._ranks.broadcast_object(
            self._write(before, after, skipped, batch) if first else None
        )
        return path

    def _write(
        self, before: dict[str, TrainState], after: dict[str, TrainState], skipped: list[str], batch: Any
    ) -> Path | None:
        number = max(one.attempted_steps for one in after.values())  # counted from 1, as in the log
        target = self._folder / f"step-{number:012d}"
        temporary = self._folder / f".tmp-{target.name}-{os.getpid()}"
        try:
            self._folder.mkdir(exist_ok=True)
            temporary.mkdir()
            states, seen = _seen(before, after, skipped)
            fill_capsule(temporary, states, seen, batch, phase=self._phase, run=self._run)
            if target.exists():  # a resumed run came by here again
                shutil.rmtree(target)
            temporary.rename(target)
            for surplus in sorted(self._folder.glob("step-*"))[self._most - 1 : -1]:
                shutil.rmtree(surplus)
        except (OSError, CheckpointError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._report(f"The step that was not finite could not be kept for steploop replay: {error}")
            self._report = lambda _: None
            return None
        return target


def _seen(
    before: Mapping[str, TrainState], after: Mapping[str, TrainState], skipped: list[str]
) -> tuple[dict[str, TrainState], dict[str, Any]]:
    """The states that the step began with, and what was seen of each."""
    states, seen = {}, {}
    for name, one in after.items():
        rebuilt = state_before(before[name], one) if name in skipped else None
        states[name] = (rebuilt or one.replace(flight=type(one.flight)())).settle()
        seen[name] = {
            "skipped": name in skipped,
            "exact": rebuilt is not None,  # else this is the state after the step: its tensors are gone
            "loss": _text(one.loss),
            "grad_norm": _text(one.grad_norm),
            "loss_scale": None if (scale := states[name].scale) is None else float(scale.scale),
        }
    return states, seen


def _text(value: Tensor | None) -> str | None:
    """A number as text: JSON has no inf and no nan."""
    return None if value is None else repr(float(value))
