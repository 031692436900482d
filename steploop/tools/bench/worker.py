"""Run one contender in a process of its own; JSON lines in, JSON lines out.

One process for each keeps the contenders apart: none sees another's patches, caches or memory.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from steploop.core.ranks import Ranks
from steploop.core.trees import count_samples
from steploop.errors import EmptyDataError, SteploopError
from steploop.recipe.recipe import Recipe
from steploop.runs.allocator import tune_allocator
from steploop.runs.members import lead
from steploop.tools.bench.by_ranks import ddp_step, on_ranks
from steploop.tools.bench.handwritten import PEERS, Step, compiled_model_step, handwritten_step, single
from steploop.tools.bench.jobs import COMPILED, COMPILED_MODEL, DDP, EAGER, EXACT, FAST, HANDWRITTEN, Job

__all__ = ["Contender", "main"]

OURS = {EAGER, COMPILED, EXACT, FAST}


class Contender:
    """One form of a recipe's step, ready to be timed.

    Args:
        job: the recipe.
        name: of the form.
    """

    def __init__(self, job: Job, name: str) -> None:
        if job.tune:
            tune_allocator()
        recipe, self._device = job.build()
        self._recipe = recipe
        self.batches = list(itertools.islice(recipe.batches.epoch(0), job.batches))
        if not self.batches:
            raise EmptyDataError(
                "bench: the recipe has no batch. Look at the size of the data and at drop_last."
            )
        self._samples = sum(count_samples(batch) or 0 for batch in self.batches) / len(self.batches)
        if job.nproc > 1:
            ranks = Ranks.here(exact=name != FAST)
            recipe, self.batches = on_ranks(recipe, self.batches, ranks, whole_parts=name in OURS)
        self._step = _form(recipe, name)
        self._next = itertools.cycle(self.batches)

    def steps(self, count: int) -> float:
        """Take ``count`` steps on batches in memory; return the seconds, the device's work included."""
        begun = time.perf_counter()
        for _ in range(count):
            self._step(next(self._next))
        self._wait()
        return time.perf_counter() - begun

    def loss(self, count: int) -> float:
        """Take ``count`` steps; return the loss of the last, on several ranks of this one's part where it is known of no other."""
        return [float(self._step(next(self._next))) for _ in range(count)][-1]

    def peak_mib(self, count: int) -> float | None:
        """Return the peak memory of ``count`` steps in MiB; None if it cannot be read."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self.steps(count)
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        if not _reset_peak():
            return None
        self.steps(count)
        return _peak_mib()

    def waiting(self, count: int) -> float:
        """Return the share of time, 0..1, that steps wait for the recipe's own batches."""
        stream = self._stream()
        self._step(next(stream))
        self._wait()
        waited, begun = 0.0, time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            self._step(batch)
        self._wait()
        return waited / (time.perf_counter() - begun)

    def samples(self) -> float:
        """Return the mean number of samples in a batch."""
        return self._samples

    def _stream(self) -> Iterator[Any]:
        for epoch in itertools.count():
            yield from self._recipe.batches.epoch(epoch)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def _form(recipe: Recipe, name: str) -> Step:
    """Make the step of one contender, as a function of a batch."""
    if name == HANDWRITTEN:
        return handwritten_step(*single(recipe.state, recipe.objective))
    if name == COMPILED_MODEL:
        return compiled_model_step(*single(recipe.state, recipe.objective))
    if name == DDP:
        return ddp_step(*single(recipe.state, recipe.objective))
    if name in PEERS:
        return PEERS[name][2](*single(recipe.state, recipe.objective))
    train_step: Any = recipe.train_step
    if name == COMPILED:
        from steploop.compilation import compile as compile_step

        train_step = compile_step(train_step)
    elif name not in OURS:
        raise SteploopError(f"bench: there is no contender {name!r}.")
    state = recipe.state

    def step(batch: Any) -> Any:
        nonlocal state
        state = train_step(state, batch)
        return lead(state).loss

    return step


_STATUS = Path("/proc/self/status")


def _reset_peak() -> bool:
    """Reset the process's peak memory (Linux, proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _STATUS.is_file()


def _peak_mib() -> float | None:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return None


def main() -> None:
    """Serve one contender until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a recipe prints is no answer
    _serve(sys.stdin, answers)


def _serve(requests: TextIO, answers: TextIO) -> None:
    contender: Contender | None = None
    for line in requests:
        try:
            request = json.loads(line)
            if contender is None:
                contender = Contender(Job.from_json(request["job"]), request["name"])
                answer: Any = {"samples": contender.samples()}
            else:
                answer = {"value": getattr(contender, request["call"])(request["count"])}
        except Exception as error:  # noqa: BLE001  any error of a recipe or a library becomes its row of the table
            answer = {
                "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
