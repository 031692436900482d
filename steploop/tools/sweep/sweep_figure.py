"""Draw a sweep with matplotlib: the metric against each setting, and parallel coordinates."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steploop.tools.report.figures import COLOURS, dressed, new_figure
from steploop.tools.sweep.sweep_axes import Placed, SweepAxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_sweep"]


def draw_sweep(axes: SweepAxes, title: str) -> "Figure":
    """The metric against each setting, two in a row, and below them parallel coordinates where settings are several.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    count = max(len(axes.settings), 1)
    parallel = len(axes.settings) > 1
    rows = -(-count // 2) + parallel
    columns = min(count, 2)
    figure = new_figure(5.2 * columns, 2.9 * rows + 0.4)
    grid = figure.add_gridspec(rows, columns)
    for n, axis in enumerate(axes.settings):
        _draw_against(figure.add_subplot(grid[n // 2, n % 2]), axis, axes.metric)
    if parallel:
        _draw_parallel(figure.add_subplot(grid[rows - 1, :]), [*axes.settings, axes.metric], len(axes.runs))
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=12)
    return figure


def _draw_against(axes: "Axes", axis: Placed, metric: Placed) -> None:
    dressed(axes, f"{metric.name} against {axis.name}")
    if len(set(axis.places)) <= len(axis.places) // 2:
        places, means = zip(*axis.means(metric.places), strict=True)
        axes.plot(places, means, color=COLOURS[0], linewidth=1.0, alpha=0.4)
    axes.plot(axis.places, metric.places, color=COLOURS[0], linestyle="none", marker="o", markersize=4)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks(*_ticks(axis))
    axes.set_yticks(*_ticks(metric))


def _ticks(axis: Placed) -> tuple[list[float], list[str]]:
    return [place for place, _ in axis.ticks], [text.replace("$", r"\$") for _, text in axis.ticks]


def _draw_parallel(axes: "Axes", placed: Sequence[Placed], runs: int) -> None:
    dressed(axes, "Parallel coordinates: each line is a run, the best ones are coloured")
    axes.grid(visible=False, axis="y")
    across = range(len(placed))
    for run in reversed(range(runs)):
        best = run < len(COLOURS)
        axes.plot(
            across, [axis.places[run] for axis in placed], color=COLOURS[run] if best else "#9aa5b1",
            linewidth=1.6 if best else 0.8, alpha=1.0 if best else 0.4,
        )  # fmt: skip
    for x, axis in zip(across, placed, strict=True):
        for place, text in axis.ticks:
            side = "right" if x == len(placed) - 1 else "left"
            axes.annotate(
                text.replace("$", r"\$"), (x, place), xytext=(-4 if side == "right" else 4, 0),
                textcoords="offset points", ha=side, va="center", fontsize=7.5, color="#5b6875",
            )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks(list(across), [axis.name.replace("$", r"\$") for axis in placed])
