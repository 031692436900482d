"""Reports steps that are not finite: their samples, their capsule, and the command that replays them."""

import shlex
from pathlib import Path
from typing import Any

from steploop.core.state.several import State
from steploop.data.batch_requests import listed
from steploop.errors import NonFiniteError
from steploop.runs.members import place_of
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

    def named(self, error: NonFiniteError, epoch: int, number: int) -> NonFiniteError:
        """The error that ends a run, with the samples of the last batch and the command that replays the first step."""
        text = str(error)
        if self._samples_of is not None:
            samples = listed(self._samples_of(epoch, number))
            text += f" The last of them was batch {number + 1} of epoch {epoch + 1}: {samples}."
        if self._capsule is not None:
            where = shlex.quote(readable(self._capsule))
            text += f" The first of them is kept; find the module that broke it with: steploop replay {where}"
        return NonFiniteError(text)
