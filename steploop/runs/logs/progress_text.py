"""Numbers of a run as text that fits a line: a step, an evaluation, a duration."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["counted", "duration", "fitting", "format_metrics", "format_step", "format_values"]

# what a narrow line leaves out first
_LEAST_WANTED = ("grad", "rate", "lr", "left")


def _short(value: float | None) -> str:
    """A number in at most seven characters."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:.1e}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 1 step, 2 steps."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_values(values: Mapping[str, float | None]) -> str:
    """Names and numbers."""
    return "  ".join(f"{name} {_short(value)}" for name, value in values.items())


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}" if value < 1e4 else f"{value / 1e3:.0f}k"


def _values(line: Mapping[str, Any], key: str) -> str:
    """The number under ``key``, or those of several states, joined."""
    own = [value for name, value in line.items() if name == key or name.endswith(f".{key}")]
    return "/".join(_short(value) for value in own)


def format_step(line: Mapping[str, Any], left_s: float | None = None) -> tuple[str, dict[str, str]]:
    """A log point as text: where it is, and the parts that follow, by name.

    Args:
        line: as in metrics.jsonl, with "epochs", the number of them.
        left_s: seconds that are left.
    """
    head = f"epoch {line['epoch']}/{line['epochs']} step {line['step']}"
    parts = {"loss": f"loss {_values(line, 'loss')}", "lr": f"lr {_values(line, 'learning_rate')}"}
    if norm := _values(line, "grad_norm"):
        parts["grad"] = f"grad {norm}"
    if sum(value for name, value in line.items() if name == "skipped" or name.endswith(".skipped")):
        parts["skipped"] = f"skipped {_values(line, 'skipped')}"
    parts["rate"] = f"{_rate(line['samples_per_s'])}/s"
    if left_s is not None:
        parts["left"] = f"{duration(left_s)} left"
    return head, parts


def fitting(parts: Mapping[str, str], width: int) -> str:
    """The parts as one text of at most ``width`` characters, without those that matter least."""
    kept = dict(parts)
    for name in _LEAST_WANTED:
        if len("  ".join(kept.values())) <= width:
            break
        kept.pop(name, None)
    return "  ".join(kept.values())


def format_metrics(line: Mapping[str, Any]) -> str:
    """An evaluation as text."""
    star = "  (best)" if line.get("best") else ""
    return f"epoch {line['epoch']} step {line['step']}: {format_values(line['metrics'])}{star}"
