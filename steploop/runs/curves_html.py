"""Small curves of a run as SVG in HTML, for a notebook."""

from html import escape
from pathlib import Path

from steploop.errors import SteploopError
from steploop.runs.reading import Curve, read_run

__all__ = ["curves_html"]

_WIDTH, _HEIGHT, _MOST_POINTS = 240, 60, 400


def curves_html(path: Path) -> str:
    """The training loss and each evaluated metric of a run; nothing where the run cannot be read."""
    try:
        run = read_run(path)
    except (SteploopError, OSError):
        return ""
    curves = {
        "training loss": run.train_curve("loss"),
        **{name: run.eval_curve(name) for name in run.metrics},
    }
    return "".join(_curve_html(name, curve) for name, curve in curves.items())


def _curve_html(name: str, curve: Curve) -> str:
    points = [
        (step, value) for step, value in zip(curve.steps, curve.values, strict=True) if value is not None
    ]
    if len(points) < 2:
        return ""
    points = points[:: max(1, len(points) // _MOST_POINTS)]
    (first, _), (last, newest) = points[0], points[-1]
    low, high = min(v for _, v in points), max(v for _, v in points)
    wide, tall = (last - first) or 1, (high - low) or 1.0
    line = " ".join(
        f"{(step - first) / wide * _WIDTH:.1f},{(high - value) / tall * _HEIGHT:.1f}"
        for step, value in points
    )
    label = f"{escape(name)}: {newest:.4g} (from {low:.4g} to {high:.4g}, steps {first} to {last})"
    return (
        f"<figure style='display:inline-block;margin:4px 12px 4px 0'><svg role='img' aria-label='{label}' width='{_WIDTH}' "
        f"height='{_HEIGHT}' viewBox='-1 -1 {_WIDTH + 2} {_HEIGHT + 2}'><polyline points='{line}' fill='none' "
        f"stroke='currentColor' stroke-width='1.5'/></svg><figcaption style='font-size:small'>{label}</figcaption></figure>"
    )
