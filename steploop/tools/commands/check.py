"""``steploop check``: test a recipe against the laws, and show in a table what fails."""

import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from steploop.tools.commands.run_options import DEVICE, RECIPE, SET

if TYPE_CHECKING:
    from steploop.tools.check.verdicts import Verdict

__all__ = ["check"]

SAMPLES = typer.Option(min=3, help="Samples of a batch to use.")
QUICK = typer.Option(
    "--quick", help="Under 20 s: fewer cases, no law that starts workers or trains for long."
)
JSON = typer.Option("--json", help="Print one JSON object at the end instead of a line for each law.")

# No law of any phase begins later than this with --quick: the last one still has to end within 20 s.
_QUICK_S = 12.0
_WORDS: dict[bool | None, str] = {True: "passed", False: "FAILED", None: "does not apply"}


def check(
    recipe: Annotated[str, RECIPE],
    *,
    overrides: Annotated[list[str] | None, SET] = None,
    device: Annotated[str, DEVICE] = "auto",
    samples: Annotated[int, SAMPLES] = 8,
    quick: Annotated[bool, QUICK] = False,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Test RECIPE against every law that applies. Exit code 1 if one fails."""
    # cuBLAS is deterministic only if this is set before it starts
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from steploop.recipe.config_values import split_assignments
    from steploop.recipe.recipe_paths import find_recipe
    from steploop.runs.environment import find_device
    from steploop.tools.check.subjects import Subject
    from steploop.tools.check.verdicts import BUILT, examine

    path, values, place = find_recipe(recipe), dict(split_assignments(overrides or [])), find_device(device)
    found: dict[str, list[Verdict]] = {}
    phase, more, begun = 0, True, time.monotonic()
    while more:
        subject = Subject(
            path=path, values=values, device=place, samples=samples, phase=phase, steps=2 if quick else 3
        )
        name = path.stem if phase == 0 else f"{path.stem}, phase {phase + 1}"
        seconds = max(_QUICK_S - (time.monotonic() - begun), 0.0) if quick else None
        found[name] = []
        for verdict in examine(subject, partial(_note, name), seconds=seconds):
            found[name].append(verdict)
            if not as_json:
                _print(name, verdict)
        if not as_json:
            _print_sum(name, found[name])
        phase += 1
        more = found[name][-1].law != BUILT and subject.recipe.then is not None
    if as_json:
        import attrs

        entry = {name: [attrs.asdict(v) for v in verdicts] for name, verdicts in found.items()}
        sys.stdout.write(json.dumps(entry, indent=2, allow_nan=False) + "\n")
    if any(v.passed is False for verdicts in found.values() for v in verdicts):
        raise SystemExit(1)


def _note(recipe: str, law: str) -> None:
    """Show the current law on one line of the screen, which the next one overwrites."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{recipe}: {law}" if law else "\r\x1b[K")
        sys.stderr.flush()


def _print(name: str, verdict: "Verdict") -> None:
    """One line for a law, as soon as it is judged."""
    _note(name, "")
    cases = f" ({verdict.cases} case{'' if verdict.cases == 1 else 's'})" if verdict.passed else ""
    why = ""
    if verdict.passed is False:
        why = f". Smallest failing example: {verdict.example}: {verdict.message}"
    elif verdict.passed is None:
        why = f": {verdict.message}"
    sys.stdout.write(f"{_word(verdict):<14}  {verdict.law}{cases}{why}\n")
    sys.stdout.flush()


def _word(verdict: "Verdict") -> str:
    return _WORDS[verdict.passed] if verdict.tried else "not tried"


def _print_sum(name: str, verdicts: "list[Verdict]") -> None:
    from collections import Counter

    counts = Counter(map(_word, verdicts))
    several = {"does not apply": "do not apply"}
    counted = [f"{n} {several.get(word, word) if n > 1 else word}" for word, n in counts.items()]
    sys.stdout.write(f"{name}: {', '.join(counted)}\n")
