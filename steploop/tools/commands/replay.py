"""``steploop replay``: take the step of a capsule again, and name the module that broke it."""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steploop.tools.replay.capsule_replay import Replay

__all__ = ["replay"]

CAPSULE = typer.Argument(help="A directory in capsules/ of a run.", show_default=False)
DEVICE = typer.Option(help="cpu, cuda (cuda:1) or mps.")
TRUST = typer.Option("--trust", help="Run the recipe in a capsule whose files belong to another user.")
JSON = typer.Option("--json", help="One JSON object instead of text.")


def replay(
    capsule: Annotated[Path, CAPSULE],
    device: Annotated[str, DEVICE] = "cpu",
    as_json: Annotated[bool, JSON] = False,
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Replay the step of CAPSULE and name the module that broke it.

    This runs the recipe in CAPSULE.
    """
    from steploop.runs.environment import find_device
    from steploop.runs.safe_text import safe_lines
    from steploop.runs.trust import require_trust
    from steploop.tools.replay.capsule_replay import replay as again

    require_trust(capsule, trust=trust, command="replay")
    found = again(capsule, device=find_device(device))
    if as_json:
        import attrs

        entry = {
            "attempted": found.capsule.about["attempted"] + 1,  # as in metrics.jsonl: the first step is 1
            "reproduced": found.reproduced,
            "overflow": found.overflow,
            "anomaly": found.anomaly,
            "losses": {name: {"then": then, "now": now} for name, (then, now) in found.losses.items()},
            "finding": None if found.finding is None else attrs.asdict(found.finding),
        }
        sys.stdout.write(json.dumps(_without_nan(entry), indent=2, allow_nan=False) + "\n")
        return
    sys.stdout.write(safe_lines("\n".join(_lines(found))) + "\n")


def _without_nan(value: Any) -> Any:
    """Replace each number that JSON lacks by None."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(found: "Replay") -> list[str]:
    about, finding = found.capsule.about, found.finding
    lines = [
        f"Attempted step {about['attempted'] + 1} (epoch {about['epoch'] + 1}, batch {about['batch'] + 1}), recorded on {about['device']} with torch {about['torch']}."
    ]
    for name, (then, now) in found.losses.items():
        lines.append(f"{name + ': ' if name else ''}loss {then} then, {now} now.")
    lines += [
        f"The state of {n or 'the model'} is the one after the step: its tensors before it were gone."
        for n in found.inexact
    ]
    if finding is None:
        return [
            *lines,
            "",
            "The step is finite here. It depends on the device, the version of torch, or on values that were not kept.",
        ]
    lines += ["", finding.what]
    if finding.operation:
        lines.append(f"Operation: {finding.operation}" + (f" ({finding.place})" if finding.place else ""))
    for title, group in (("What went in", finding.went_in), ("What came out", finding.came_out)):
        if group:
            lines += ["", f"{title}:", *(f"  {stats}" for stats in group)]
    if found.overflow:
        lines += [
            "",
            "Without the loss scale the same step is finite: the scale was too high, which it finds out this way and backs off.",
        ]
    if found.anomaly:
        lines += ["", f"torch's anomaly detection: {found.anomaly}"]
    return lines
