"""Draw figures with matplotlib: runs, schedules, a learning-rate range test."""

import math
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steploop.core.extras import import_extra
from steploop.tools.report.output_files import write_output
from steploop.tools.report.panels import FROM_ZERO, Panel, Series
from steploop.tools.report.terminal_plots import falling_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "draw_panels", "draw_range_test", "draw_schedules", "dressed", "new_figure", "save"]

# Eight colours that stay apart for colour-blind eyes and on white paper: Okabe and Ito 2008, black and yellow replaced
# by a grey and an ochre that can be read as thin lines. https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07C00", "#56B4E9", "#7A5195", "#6B7280")
_INK, _GRID = "#1f2933", "#e4e7eb"


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # not pyplot: no global state, and no window is ever opened
    module = import_extra(
        "matplotlib.figure", extra="plot", purpose="Drawing PNG and SVG (steploop report does without)"
    )
    figure: Figure = module.Figure(figsize=(width, height), layout="constrained")
    return figure


def _plain(text: str) -> str:
    """A name in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def dressed(axes: "Axes", title: str, unit: str = "") -> None:
    """Give axes their title and looks."""
    axes.set_title(_plain(title), loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_ylabel(_plain(unit), fontsize=9, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")
    axes.grid(visible=True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=_INK)


def _colour(series: Series, position: int, *, many_runs: bool) -> str:
    """One run: a colour for each curve. Several runs: a colour for each run."""
    return COLOURS[(series.run if many_runs else position) % len(COLOURS)]


def _points(series: Series, *, log: bool) -> tuple[list[int], list[float]]:
    values = [math.nan if v is None or (log and v <= 0) else v for v in series.curve.values]
    return list(series.curve.steps), values


def _draw_series(axes: "Axes", series: Series, colour: str, *, log: bool, drawstyle: str) -> None:
    steps, values = _points(series, log=log)
    looks: dict[str, dict[str, Any]] = {
        "line": {"linewidth": 1.6},
        "faint": {"linewidth": 0.7, "alpha": 0.3},
        "dashed": {"linewidth": 1.4, "linestyle": (0, (4, 2))},
        "points": {"linewidth": 1.3, "marker": "o", "markersize": 3.5},
    }
    label = None if series.style == "faint" or not series.label else _plain(series.label)
    axes.plot(
        steps,
        values,
        color=colour,
        label=label,
        solid_capstyle="round",
        drawstyle=drawstyle,
        **looks[series.style],
    )


def _draw_panel(axes: "Axes", panel: Panel, *, many_runs: bool) -> None:
    log = panel.scale == "log" and any(v is not None and v > 0 for s in panel.series for v in s.curve.values)
    dressed(axes, panel.title, panel.unit)
    position = 0
    drawstyle = (
        "steps-post" if panel.key == "loss_scale" else "default"
    )  # it holds its value, then halves at once
    by_run = many_runs and panel.key != "layer_norms"
    for series in panel.series:
        colour = _colour(series, position, many_runs=by_run)
        _draw_series(axes, series, colour, log=log, drawstyle=drawstyle)
        position += series.style != "faint"
    if log:
        _log_scale(axes, base=2 if panel.key == "loss_scale" else 10)
    elif panel.key in FROM_ZERO:
        axes.set_ylim(bottom=0.0)
    if panel.marks:
        _mark_skipped(axes, panel)
    if any(s.label and s.style != "faint" for s in panel.series) or panel.marks:
        axes.legend(fontsize=8, frameon=True, framealpha=0.8, edgecolor="none", labelcolor=_INK)


def _log_scale(axes: "Axes", *, base: int) -> None:
    """A logarithmic axis whose labels are plain numbers, few enough to read over less than a decade too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    if base == 2:
        axes.yaxis.set_minor_locator(NullLocator())
        return
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.9 else range(1, 10))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_skipped(axes: "Axes", panel: Panel) -> None:
    """A short tick on the horizontal axis for every step that was not taken."""
    axes.plot(
        [step for _, step in panel.marks], [0.0] * len(panel.marks), transform=axes.get_xaxis_transform(),
        linestyle="none", marker="|", markersize=9, markeredgewidth=1.2, color="#c0143c", clip_on=False,
        label=f"skipped steps ({len(panel.marks)})",
    )  # fmt: skip


def draw_panels(found: Sequence[Panel], title: str) -> "Figure":
    """All panels in one figure, two columns wide; the runs in one colour each where there are several.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = 1 if len(found) == 1 else 2
    rows = -(-len(found) // columns)
    figure = new_figure(5.2 * columns, 2.9 * rows + 0.4)
    many_runs = len({s.run for panel in found for s in panel.series}) > 1
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, panel in zip(cells, found, strict=False):
        _draw_panel(axes, panel, many_runs=many_runs)
    for axes in cells[len(found) :]:
        axes.set_visible(False)
    for axes in cells[max(len(found) - columns, 0) : len(found)]:
        axes.set_xlabel("attempted steps", fontsize=9, color=_INK)
        axes.tick_params(labelbottom=True)
    if notes := dict.fromkeys(panel.note for panel in found if panel.note):
        figure.supxlabel(" ".join(notes), fontsize=8, color="#5b6875")
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12, color=_INK)
    return figure


def draw_schedules(
    curves: Mapping[str, Sequence[float]], momenta: Mapping[str, Sequence[float]] | None = None
) -> "Figure":
    """Schedules side by side, each over its own steps, with the same axes; the momentum dashed where it cycles.

    Args:
        curves: name -> learning rate of step 0, 1, ...
        momenta: name -> momentum of the same steps, for those that cycle it.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = new_figure(3.5 * columns, 2.3 * rows + 0.2)
    cells = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for i, (axes, (name, rates)) in enumerate(zip(cells, curves.items(), strict=False)):
        dressed(axes, name)
        axes.plot(range(len(rates)), rates, color=COLOURS[i % len(COLOURS)], linewidth=1.8)
        axes.fill_between(range(len(rates)), rates, color=COLOURS[i % len(COLOURS)], alpha=0.1, linewidth=0)
        if momenta and name in momenta:
            other = axes.twinx()
            other.plot(
                range(len(rates)), momenta[name], color="#6b7280", linewidth=1.1, linestyle=(0, (3, 2))
            )
            other.spines[["top", "left", "bottom"]].set_visible(False)
            other.spines["right"].set_color("#9aa5b1")
            other.set_ylabel("momentum (dashed)", fontsize=8, color="#6b7280")
            other.tick_params(labelsize=8, colors="#6b7280")
    for axes in cells[len(curves) :]:
        axes.set_visible(False)
    for i, axes in enumerate(cells[: len(curves)]):
        if i % columns == 0:
            axes.set_ylabel("learning rate", fontsize=9, color=_INK)
        if i + columns >= len(curves):
            axes.set_xlabel("applied steps", fontsize=9, color=_INK)
            axes.tick_params(labelbottom=True)
    return figure


def draw_range_test(
    rates: Sequence[float],
    losses: Sequence[float | None],
    smooth: Sequence[float | None],
    suggestion: float | None,
    title: str,
) -> "Figure":
    """The curve of a learning-rate range test: loss over learning rate, both as measured and smoothed."""
    figure = new_figure(6.4, 3.8)
    axes = figure.subplots()
    dressed(axes, title, "loss")
    axes.plot(
        rates, [math.nan if v is None else v for v in losses], color=COLOURS[0], linewidth=0.8, alpha=0.35
    )
    axes.plot(
        rates,
        [math.nan if v is None else v for v in smooth],
        color=COLOURS[0],
        linewidth=1.8,
        label="loss, smoothed",
    )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=9, color=_INK)
    if (window := falling_window(smooth)) is not None:
        axes.set_ylim(*window)
    if suggestion is not None:
        axes.axvline(
            suggestion,
            color=COLOURS[1],
            linewidth=1.4,
            linestyle=(0, (4, 2)),
            label=f"suggestion {suggestion:.2g}",
        )
    axes.legend(fontsize=8.5, frameon=False, labelcolor=_INK)
    return figure


def save(figure: "Figure", stem: Path) -> list[Path]:
    """Write ``stem``.png and ``stem``.svg; the same curves give the same bytes on one version of matplotlib.

    Returns:
        The two paths.

    Raises:
        ConfigError: they cannot be written, or links have these names.
    """
    import matplotlib as mpl

    png, svg = BytesIO(), BytesIO()
    style: Any = {"svg.hashsalt": "steploop", "svg.fonttype": "none", "font.family": "sans-serif"}
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from"
        )  # a name in another script: the SVG has it as text
        figure.savefig(png, format="png", dpi=144, facecolor="white")
        figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None})
    files = {"png": png, "svg": svg}
    return [
        write_output(stem.with_name(f"{stem.name}.{end}"), file.getvalue()) for end, file in files.items()
    ]
