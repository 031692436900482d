"""Draw curves as inline SVG that stretches with the window.

The drawing stretches (``preserveAspectRatio="none"``) while its strokes do not, and the numbers at the axes are
HTML placed in percent: so they are legible at any width, on paper, and with the script switched off.
"""

import html
import json
import math

import attrs

from steploop.runs.reading import Curve
from steploop.tools.report.curve_points import thinned
from steploop.tools.report.panels import FROM_ZERO, Panel, Series

__all__ = ["chart", "nice_ticks"]

_MOST_MARKS = 2000  # ticks for skipped steps
_W, _H = 1000.0, 240.0  # the drawing's own units


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within ``low .. high``, about ``count`` of them."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((m for m in (1, 2, 5) if (high - low) / (step * m) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    ticks = [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks or [low]


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    first, last = math.floor(math.log(low, base) - 1e-9), math.ceil(math.log(high, base) + 1e-9)
    factors = [1] if base == 2 or last - first > 3 else [1, 2, 5]
    ticks = [m * float(base) ** k for k in range(first, last + 1) for m in factors]
    inside = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
    return inside[:: -(-len(inside) // 7)] if inside else [low]


@attrs.frozen
class Axis:
    """A scale: values onto 0 .. 1, and where its numbers stand."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value, 0 at the low end and 1 at the high one."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def _vertical(panel: Panel) -> Axis | None:
    log = panel.scale == "log"
    values = [v for s in panel.series for v in s.curve.values if v is not None and (v > 0 or not log)]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high > low else 2.0
        low, high = low / margin, high * margin
        return Axis(low, high, tuple(_log_ticks(low, high, 2 if panel.key == "loss_scale" else 10)), log=True)
    if panel.key in FROM_ZERO:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    high += margin
    low = low if low == 0 else low - margin
    return Axis(low, high, tuple(nice_ticks(low, high)))


def _path(curve: Curve, across: Axis, up: Axis, *, stairs: bool = False) -> str:
    parts: list[str] = []
    pen_up = True
    for step, value in zip(curve.steps, curve.values, strict=True):
        if value is None or (up.log and value <= 0):
            pen_up = True
            continue
        x, y = across.at(step) * _W, (1 - up.at(value)) * _H
        if pen_up:
            parts.append(f"M{x:.1f} {y:.1f}")
        else:
            parts.append(f"H{x:.1f}V{y:.1f}" if stairs else f"L{x:.1f} {y:.1f}")
        pen_up = False
    return "".join(parts)


def _dots(curve: Curve, across: Axis, up: Axis) -> str:
    """Points as strokes of no length with round ends: circles would be stretched with the drawing."""
    places = (
        (s, v)
        for s, v in zip(curve.steps, curve.values, strict=True)
        if v is not None and (v > 0 or not up.log)
    )
    return "".join(f"M{across.at(s) * _W:.1f} {(1 - up.at(v)) * _H:.1f}h0" for s, v in places)


def number(value: float) -> str:
    """A number as a report shows it: four figures, thousands apart."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def _tick(value: float, *, log2: bool = False) -> str:
    if log2:
        return f"2<sup>{round(math.log2(value))}</sup>"
    return (
        f"{value:,.6g}"
        if value == 0 or 1e-4 <= abs(value) < 1e6
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _colour(series: Series, position: int, *, by_run: bool) -> int:
    return (series.run if by_run else position) % 8


@attrs.frozen
class Face:
    """The drawing of a panel on one vertical scale.

    Attributes:
        up: the vertical axis.
        curves: SVG path data of each series: its line, and its points if it is drawn with points.
        grid: SVG path data of the horizontal lines.
        numbers: HTML of the numbers at the vertical axis.
    """

    up: Axis
    curves: tuple[tuple[str, ...], ...]
    grid: str
    numbers: str


def _face(panel: Panel, across: Axis) -> Face | None:
    """The drawing on the panel's scale; None if it has no value there."""
    up = _vertical(panel)
    if up is None:
        return None
    scaled = panel.key == "loss_scale"
    curves = tuple(
        (
            _path(s.curve, across, up, stairs=scaled),
            *([_dots(s.curve, across, up)] if s.style == "points" else []),
        )
        for s in panel.series
    )
    numbers = "".join(
        f'<span style="top:{(1 - up.at(t)) * 100:.2f}%">{_tick(t, log2=scaled)}</span>' for t in up.ticks
    )
    grid = "".join(f"M0 {(1 - up.at(t)) * _H:.1f}H{_W:.0f}" for t in up.ticks)
    return Face(up, curves, grid, numbers)


def _other_scale(panel: Panel) -> Panel | None:
    """The panel on the other scale, for quantities that are read on both: all values positive, and no share or rate."""
    values = [v for s in panel.series for v in s.curve.values if v is not None]
    if panel.key in FROM_ZERO or panel.key == "loss_scale" or min(values) <= 0:
        return None
    return attrs.evolve(panel, scale="linear" if panel.scale == "log" else "log")


def chart(panel: Panel, *, many_runs: bool, last_step: int, identity: str) -> str:
    """A panel as an HTML figure with its legend; the arrow keys move along it, a button switches its scale.

    Args:
        panel: what to draw.
        many_runs: whether a colour stands for a run instead of for a curve.
        last_step: end of the horizontal axis, the same for all panels.
        identity: of the figure in the page, unique.
    """
    panel = attrs.evolve(panel, series=tuple(attrs.evolve(s, curve=thinned(s.curve)) for s in panel.series))
    title, unit = html.escape(panel.title), html.escape(panel.unit)
    across = Axis(0.0, float(max(last_step, 1)), tuple(nice_ticks(0.0, float(max(last_step, 1)), 6)))
    face = _face(panel, across)
    if face is None:
        return f'<figure class="chart"><figcaption>{title}</figcaption><p>No value of it was finite.</p></figure>'
    by_run = many_runs and panel.key != "layer_norms"
    shapes, legend, data, position = [], [], [], 0
    for s, (line, *dots) in zip(panel.series, face.curves, strict=True):
        colour = _colour(s, position, by_run=by_run)
        shapes.append(f'<path class="s {s.style} c{colour}" d="{line}"/>')
        shapes += [f'<path class="dots c{colour}" d="{points}"/>' for points in dots]
        if s.style == "faint":
            continue
        position += 1
        if s.label:
            legend.append(f'<li><span class="key {s.style} b{colour}"></span>{html.escape(s.label)}</li>')
        rounded = [None if v is None else float(f"{v:.6g}") for v in s.curve.values]
        data.append({"l": s.label or panel.title, "c": colour, "x": s.curve.steps, "y": rounded})
    marks = "".join(f"M{across.at(step) * _W:.1f} {_H}v-12" for _, step in panel.marks[:_MOST_MARKS])
    if marks:
        shapes.append(f'<path class="skip" d="{marks}"/>')
        legend.append(f'<li><span class="key skipkey"></span>skipped steps ({len(panel.marks)})</li>')
    x_labels = "".join(
        f'<span style="left:{across.at(t) * 100:.2f}%">{_tick(t)}</span>' for t in across.ticks
    )
    content = {
        "x": [across.low, across.high],
        "s": data,
        "skip": [m[1] for m in panel.marks[:_MOST_MARKS]],
        "scale": panel.scale,
    }
    if (other := _other_scale(panel)) is not None and (turned := _face(other, across)) is not None:
        content["other"] = {
            "d": [turned.grid, *(d for curve in turned.curves for d in curve)],
            "numbers": turned.numbers,
        }
    keys = f'<ul class="legend">{"".join(legend)}</ul>' if legend else ""
    note = f'<p class="note">{html.escape(panel.note)}</p>' if panel.note else ""
    unit_note = f' <span class="unit">{unit}</span>' if unit else ""
    return (
        f'<figure class="chart" id="{identity}"><figcaption>{title}{unit_note}</figcaption>{keys}'
        f'<div class="plot" tabindex="0" role="group" aria-roledescription="chart" '
        f'aria-label="{title} over attempted steps. Arrow keys move along it, Home and End to its ends.">'
        f'<div class="ys" aria-hidden="true">{face.numbers}</div>'
        f'<div class="area"><svg viewBox="0 0 {_W:.0f} {_H:.0f}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{face.grid}"/>{"".join(shapes)}</svg><div class="cursor" hidden></div></div>'
        f'<div class="xs" aria-hidden="true">{x_labels}</div></div>'
        f'<output class="values" aria-live="polite"></output>{note}'
        f'<script type="application/json">{_embedded(content)}</script></figure>'
    )


def _embedded(value: dict[str, object]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")
