"""Reports steps that are not finite: their samples, their capsule, and the command that replays them."""

import shlex
from pathlib import Path
from typing import Any

from steploop.core.state.several import State
from steploop.core.state.train_state import TrainState
from steploop.data.batch_requests import listed
from steploop.errors import NonFiniteError
from steploop.runs.members import at_position, place_of
from steploop.runs.plan import Journal, Witness
from steploop.runs.text_names import readable

__all__ = ["SkipReporter"]


class SkipReporter:
    """Reports each skipped step to the journal, and completes the error that ends a run.

    Args:
        batches: of the recipe; where they have ``samples_of(epoch, batch)``, as a `Loader` has, samples are named.
        witness: keeps skipped steps; None: they are only counted.
        journal: gets each of them.
    """

    def __init__(self, batches: Any, witness: Witness | None, journal: Journal) -> None:
        self._samples_of = getattr(batches, "samples_of", None)
        self._witness = witness
        self._journal = journal
        self._capsule: Path | None = None  # of the row of skipped steps that is going on

    def see(self, given: State, state: State, batch: Any, epoch: int, number: int, *, wait: bool) -> None:
        """Look at a step; on a device, only where its numbers are read anyway.

        Args:
            given: what went into it.
            state: what came out.
            batch: what it was taken on.
            epoch: of that batch.
            number: of that batch in its epoch.
            wait: whether the device may be asked.
        """
        if self._witness is None:
            return
        skipped = self._witness.after_step(given, state, batch, wait=wait)
        if skipped is None:
            self._capsule = None
            return
        path = skipped.capsule
        self._capsule = path or self._capsule
        capsule = None if path is None else f"{path.parent.name}/{path.name}"
        held = {} if self._samples_of is None else {"samples": self._samples_of(epoch, number)}
        self._journal.event({"event": "skipped", **place_of(state), "capsule": capsule, **held})

    def went_well(self) -> None:
        """Note steps that were finite."""
        self._capsule = None

    def see_raised(self, error: NonFiniteError, given: State, batch: Any, epoch: int, number: int) -> None:
        """Look at a step that raised: the first of its row, where one is enough, has left no capsule yet.

        Of several states, one whose step came before may have given its tensors away, and nothing is kept.
        """
        after = _after(given, error.state)
        if after is not None:
            self.see(given, at_position(after, number + 1), batch, epoch, number, wait=True)

    def named(self, error: NonFiniteError, epoch: int, number: int) -> NonFiniteError:
        """The error that ends a run, with the samples of the last batch and the command that replays the first step."""
        text = str(error)
        if self._samples_of is not None:
            samples = listed(self._samples_of(epoch, number))
            text += f" The last of them was batch {number + 1} of epoch {epoch + 1}: {samples}."
        if self._capsule is not None:
            where = shlex.quote(readable(self._capsule))
            text += f" The first of them is kept; find the module that broke it with: steploop replay {where}"
        return NonFiniteError(text, state=error.state)


def _after(given: State, raised: TrainState | None) -> State | None:
    """What a step that raised would have returned; None where it is not known of every state."""
    if raised is None or isinstance(given, TrainState):
        return raised
    after = {name: raised if one.lease is raised.lease else one for name, one in given.items()}
    return after if all(one.alive for one in after.values()) and raised in after.values() else None
