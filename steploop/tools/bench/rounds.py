"""Time the contenders in turns, in short rounds: ratios with their spread, and advice."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from steploop.errors import SteploopError
from steploop.tools.bench.jobs import COMPILED, COMPILING, EAGER, EXACT, FAST, Job

__all__ = ["ContenderFailed", "Measured", "Results", "Worker", "advice", "measure"]

_FIRST_STEPS = 3  # the first makes slots, the second compiles, the third runs what was compiled
_CHUNK_S = 0.25  # seconds of one contender's turn
_NOISE = 0.03  # ratios closer to 1 than this decide nothing
_WAITS = 0.15  # a step that waits longer than this share for data has its problem there


@attrs.frozen(kw_only=True)
class Measured:
    """The figures of one contender.

    Attributes:
        name: of the form.
        us: microseconds per step in each round.
        ratios: time over the base's time in the same round.
        samples_per_s: at the fastest round.
        peak_mib: memory held at most during steps: of the device, or of the process.
        first_s: seconds until three steps were taken: tracing, compiling.
        again_s: the same in a second process, which finds what the first one compiled; None for a form that compiles nothing.
        error: why there are no numbers, or None.
    """

    name: str
    us: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    samples_per_s: float | None = None
    peak_mib: float | None = None
    first_s: float | None = None
    again_s: float | None = None
    error: str | None = None

    @property
    def best_us(self) -> float:
        """The time of the fastest round: interference only adds time."""
        return min(self.us)

    @property
    def ratio(self) -> float:
        """The median ratio to the base's time."""
        return statistics.median(self.ratios)


@attrs.frozen(kw_only=True)
class Results:
    """The results of a benchmark.

    Attributes:
        rows: of every contender.
        base: the name of the one that ratios are to.
        waiting: share of a step that waits for data, 0..1, in steploop's faster form; None where unknown.
    """

    rows: tuple[Measured, ...]
    base: str
    waiting: float | None


class Worker:
    """A process that runs ``steploop.tools.bench.worker``.

    Args:
        job: the recipe; None: it is given later, by ``ask``.
        name: of the contender.
        environment: of the process; None: this one's.
    """

    def __init__(
        self, job: Job | None = None, name: str = "", *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "steploop.tools.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        if job is not None:
            self.samples: float = self.ask({"job": job.to_json(), "name": name})["samples"]

    def call(self, method: str, count: int) -> Any:
        """Call a method of the contender and return its result."""
        return self.ask({"call": method, "count": count})["value"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer; ContenderFailed where it is an error."""
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise SteploopError("bench: the worker has no pipes.")
        try:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = (
            json.loads(line) if line else {"error": f"the process died ({self._process.poll()})"}
        )
        if "error" in answer:
            self.close()
            raise ContenderFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class ContenderFailed(Exception):  # noqa: N818  (it never leaves this module)
    """Says why a contender cannot be measured."""


def measure(
    job: Job,
    names: Sequence[str],
    *,
    rounds: int,
    report: Callable[[str], None],
    workers: Callable[[Job, str], Any] = Worker,
) -> Results:
    """Measure the contenders, one process each, one at a time.

    Args:
        job: the recipe.
        names: of the contenders.
        rounds: in each, every contender has one turn.
        report: called with each stage, as text.
        workers: makes what runs a contender, with one cache of compiled code for all; an empty one makes ``first_s`` cold.
    """
    alive: dict[str, Any] = {}
    errors: dict[str, str] = {}
    firsts: dict[str, float] = {}
    counts: dict[str, int] = {}
    try:
        for name in names:
            report(f"{name}: building and warming up")
            try:
                alive[name] = worker = workers(job, name)
                firsts[name] = worker.call("steps", _FIRST_STEPS)
                per_step = worker.call("steps", _FIRST_STEPS) / _FIRST_STEPS
                counts[name] = max(1, min(1000, round(_CHUNK_S / max(per_step, 1e-6))))
            except ContenderFailed as error:
                alive.pop(name, None)
                errors[name] = str(error)
        times: dict[str, list[float]] = {name: [] for name in alive}
        for number in range(rounds):
            report(f"round {number + 1} of {rounds}")
            for name, worker in alive.items():
                times[name].append(worker.call("steps", counts[name]) / counts[name] * 1e6)
        peaks = {name: worker.call("peak_mib", min(10, counts[name])) for name, worker in alive.items()}
        agains: dict[str, float | None] = {}
        for name in COMPILING:
            if name not in alive:
                continue
            report(f"{name}: once more, in a second process")
            agains[name] = _again(job, name, workers)
        base = next(iter(alive), names[0])
        rows = tuple(
            Measured(name=name, error=errors[name])
            if name in errors
            else Measured(
                name=name,
                us=tuple(times[name]),
                ratios=tuple(own / other for own, other in zip(times[name], times[base], strict=True)),
                samples_per_s=alive[name].samples / min(times[name]) * 1e6,
                peak_mib=peaks[name],
                first_s=firsts[name],
                again_s=agains.get(name),
            )
            for name in names
        )
        ours = [row for row in rows if row.name in {EAGER, COMPILED} and not row.error]
        waiting = None
        if ours:
            fastest = min(ours, key=lambda row: row.best_us).name
            report("waiting for data")
            waiting = alive[fastest].call("waiting", max(10, min(100, 2 * counts[fastest])))
        return Results(rows=rows, base=base, waiting=waiting)
    finally:
        for worker in alive.values():
            worker.close()


def _again(job: Job, name: str, workers: Callable[[Job, str], Any]) -> float | None:
    """Seconds until a new process of a contender has taken its first steps; None where it fails."""
    try:
        worker = workers(job, name)
    except ContenderFailed:
        return None
    try:
        return float(worker.call("steps", _FIRST_STEPS))
    except ContenderFailed:
        return None
    finally:
        worker.close()


def advice(results: Results, remedy: str = "") -> str:
    """Say in a sentence or two which form to use, and why.

    Args:
        results: of a benchmark.
        remedy: what helps a step that waits for its data.
    """
    rows = {row.name: row for row in results.rows if not row.error}
    if EXACT in rows and FAST in rows:
        return _advice_on_ranks(results, rows[EXACT], rows[FAST])
    eager, compiled = rows.get(EAGER), rows.get(COMPILED)
    if eager is None and compiled is None:
        return "steploop could not be measured; the table says why."
    if results.waiting is not None and results.waiting > _WAITS:
        return (
            f"Look at the data first: {results.waiting:.0%} of a step waits for a batch, which no form of the step "
            f"changes. {remedy}"
        ).rstrip()
    if compiled is None or eager is None:
        only = "eager" if compiled is None else "compiled"
        return f"Use the {only} form: the other could not be measured; the table says why."
    gain = eager.best_us / compiled.best_us
    if gain > 1 + _NOISE:
        first = f", and its {compiled.first_s:.0f} s of compiling" if compiled.first_s is not None else ""
        steps = (compiled.first_s or 0.0) * 1e6 / (eager.best_us - compiled.best_us)
        return f"Use --compile: it is {gain:.2f} times as fast as eager{first} are won back after {steps:,.0f} steps."
    return f"Use the eager form: compiling does not pay here ({gain:.2f} times its speed)."


def _advice_on_ranks(results: Results, exact: Measured, fast: Measured) -> str:
    between = max(max(row.ratios) - min(row.ratios) for row in results.rows if not row.error)
    said = f"Exact sums take {exact.ratio:.2f} of the time of {results.base}, fast ones {fast.ratio:.2f}; single rounds differ by {between:.2f}."
    gain = exact.ratio / fast.ratio
    if gain > 1 + max(_NOISE, between):
        return f"{said} Use --ranks fast where the number of ranks need not leave the bits alone."
    return f"{said} Keep the exact sums: what the others would save is within the noise."
