"""Make the report of a sweep: one HTML file with its table, its figures, and its best runs in detail."""

import html
from collections.abc import Sequence

from steploop.errors import SteploopError
from steploop.runs.reading import RunRecord, read_run
from steploop.runs.safe_text import safe_text
from steploop.tools.report.charts import number
from steploop.tools.report.markup import definitions, folded, section, table
from steploop.tools.report.pages import comparison, page, tile
from steploop.tools.sweep.sweep_axes import Placed, SweepAxes, sweep_axes
from steploop.tools.sweep.sweep_record import SweepRecord
from steploop.tools.sweep.sweep_result import SweepResult, read_result, settings_text

__all__ = ["sweep_page"]

_DETAILED = 8  # runs whose curves are shown: there are so many colours
_W, _H = 1000.0, 240.0  # the drawing's own units, as in charts


def sweep_page(sweep: SweepRecord) -> str:
    """The page of a sweep."""
    result = read_result(sweep)
    axes = sweep_axes(result)
    best = _best_runs(result)
    parts = [
        _result(result),
        _failures(result),
        "" if axes is None else _figures(axes),
        section(
            "Sweep",
            definitions({"directory": sweep.path, "recipe": sweep.recipe["path"], "search": sweep.search}),
        ),
    ]
    if best:
        note = (
            f"<p>The {len(best)} best runs of {len(result.members)} in detail.</p>"
            if len(result.members) > len(best)
            else ""
        )
        parts += [note, comparison(best)]
    return page(f"Sweep of {result.recipe}: {result.planned} runs", "".join(parts))


def _best_runs(result: SweepResult) -> list[RunRecord]:
    found: list[RunRecord] = []
    for member in (m for row in result.rows for m in row.members if m.state != "waiting"):
        if len(found) == _DETAILED:
            break
        try:
            found.append(read_run(member.run))
        except (SteploopError, OSError):  # it never began, or was removed
            continue
    return found


def _result(result: SweepResult) -> str:
    tiles = []
    if (best := result.best) is not None and best.mean is not None:
        over = f" ± {number(best.spread)} over {len(best.values)} runs" if best.spread is not None else ""
        tiles.append(
            tile(number(best.mean), f"best {result.metric}{over}", settings_text(best.settings), first=True)
        )
    done = sum(member.state == "finished" for member in result.members)
    tiles.append(tile(f"{done} of {result.planned}", "runs finished"))
    if result.failed:
        tiles.append(tile(len(result.failed), "runs failed"))
    heads, body = result.cells()
    first = heads.index(result.metric) if result.metric in heads else len(heads) - 3
    shown = folded(
        heads, body, numbers=range(first, len(heads) - 1), label="Settings", what="settings", last=False
    )
    return (
        f'<section class="result" aria-label="Result"><div class="tiles">{"".join(tiles)}</div></section>'
        + section("Result, best first" if result.mode else "Result", shown)
    )


def _failures(result: SweepResult) -> str:
    rows = [
        [safe_text(m.run), settings_text(m.settings), m.state, m.error or "its process is gone"] for m in result.failed
    ]  # fmt: skip
    return (
        section("Failed", table(["run", "settings", "state", "error"], rows, label="Failed")) if rows else ""
    )


def _figures(axes: SweepAxes) -> str:
    figures = [_scatter(axis, axes.metric) for axis in axes.settings]
    note = (
        '<p class="note">Each point is a run; the line joins the means of the runs with the same value.</p>'
    )
    each = (
        section("Metric against each setting", note, f'<div class="charts">{"".join(figures)}</div>')
        if figures
        else ""
    )
    if len(axes.settings) < 2:
        return each
    note = '<p class="note">Each line is a run; the best ones are coloured.</p>'
    return each + section(
        "Parallel coordinates", note, _parallel([*axes.settings, axes.metric], len(axes.runs))
    )


def _plot(
    caption: str, drawn: str, *, kind: str = "", numbers: str = "", inside: str = "", below: str
) -> str:
    return (
        f'<figure class="chart"><figcaption>{html.escape(caption)}</figcaption><div class="plot{kind}">'
        f'<div class="ys" aria-hidden="true">{numbers}</div>'
        f'<div class="area"><svg viewBox="0 0 {_W:.0f} {_H:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(caption)}">{drawn}</svg>{inside}</div><div class="xs" aria-hidden="true">{below}</div></div></figure>'
    )


def _scatter(axis: Placed, metric: Placed) -> str:
    """The metric over one setting."""
    heights = metric.places
    points = "".join(f"M{x * _W:.1f} {(1 - y) * _H:.1f}h0" for x, y in zip(axis.places, heights, strict=True))
    line = "L".join(f"{x * _W:.1f} {(1 - y) * _H:.1f}" for x, y in axis.means(heights))
    grid = "".join(f"M0 {(1 - y) * _H:.1f}H{_W:.0f}" for y, _ in metric.ticks)
    numbers = "".join(
        f'<span style="top:{(1 - y) * 100:.2f}%">{html.escape(t)}</span>' for y, t in metric.ticks
    )
    below = "".join(f'<span style="left:{x * 100:.2f}%">{html.escape(t)}</span>' for x, t in axis.ticks)
    # beyond so many places, means of one run each are no line to read
    means = (
        f'<path class="s faint c0" d="M{line}"/>' if len(set(axis.places)) <= len(axis.places) // 2 else ""
    )
    drawn = f'<path class="grid" d="{grid}"/>{means}<path class="dots c0" d="{points}"/>'
    return _plot(f"{metric.name} against {axis.name}", drawn, numbers=numbers, below=below)


def _parallel(axes: Sequence[Placed], runs: int) -> str:
    """All settings and the metric side by side; a line for each run, the best ones last, on top."""
    across = [n / (len(axes) - 1) for n in range(len(axes))]
    shapes = []
    for run in reversed(range(runs)):
        path = "L".join(
            f"{x * _W:.1f} {(1 - a.places[run]) * _H:.1f}" for x, a in zip(across, axes, strict=True)
        )
        looks = f"s c{run}" if run < _DETAILED else "s faint c7"
        shapes.append(f'<path class="{looks}" d="M{path}"/>')
    grid = "".join(f"M{x * _W:.1f} 0V{_H:.0f}" for x in across)
    inside = "".join(
        f'<span class="at{" end" if x == 1 else ""}" style="left:{x * 100:.2f}%;top:{(1 - y) * 100:.2f}%">{html.escape(t)}</span>'
        for x, axis in zip(across, axes, strict=True)
        for y, t in axis.ticks
    )
    places = {0.0: ' class="first"', 1.0: ' class="last"'}
    below = "".join(
        f'<span{places.get(x, "")} style="left:{x * 100:.2f}%">{html.escape(axis.name)}</span>'
        for x, axis in zip(across, axes, strict=True)
    )
    drawn = f'<path class="grid" d="{grid}"/>{"".join(shapes)}'
    return _plot(f"Settings and {axes[-1].name}", drawn, kind=" wide", inside=inside, below=below)
