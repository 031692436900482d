"""Make the report: one HTML file about runs that needs no network."""

import base64
import html
from collections.abc import Sequence
from importlib import resources

from steploop.errors import ConfigError, DataError
from steploop.runs.directory_reader import read_file
from steploop.runs.reading import RunRecord
from steploop.runs.safe_text import safe_text
from steploop.tools.report.charts import chart
from steploop.tools.report.details import (
    evaluations,
    events,
    recipe_sources,
    reproduce,
    times,
    value_text,
    what_ran,
)
from steploop.tools.report.markup import Markup, section, table, text
from steploop.tools.report.panels import arrange
from steploop.tools.report.results import duration, outcome, result_of
from steploop.tools.report.run_labels import differences, labels, short

__all__ = ["comparison", "page", "report", "tile"]

_MAX_PICTURE_BYTES = 2_000_000  # of one picture that is put into the page


def report(runs: Sequence[RunRecord], *, live: bool = False) -> str:
    """The page. The result comes first, then what ran, the curves, the evaluations, and how to do it again.

    Args:
        runs: what to report on.
        live: let the page ask the server that it came from for a newer one, again and again.

    Raises:
        ConfigError: there is no run to report on.
    """
    if not runs:
        raise ConfigError("report: expected at least one run directory, but got none.")
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    title = ", ".join(recipes) + (f": {len(runs)} runs" if len(runs) > 1 else "")
    return page(title, comparison(runs), live=live)


def comparison(runs: Sequence[RunRecord]) -> str:
    """The sections about at least one run."""
    names = labels(runs)
    parts = [
        _results(runs, names),
        _curves(runs),
        _pictures(runs, names),
        evaluations(runs, names),
        events(runs, names),
        times(runs, names),
        what_ran(runs, names),
        reproduce(runs, names),
        recipe_sources(runs, names),
    ]
    return "".join(parts)


def _asset(name: str) -> str:
    return resources.files("steploop.tools.report").joinpath("assets", name).read_text(encoding="utf-8")


def page(title: str, body: str, *, live: bool = False) -> str:
    """A whole page of these sections; a live one may ask the server that it came from."""
    # the policy is the promise in a form that a browser keeps: nothing is fetched, whatever the page contains
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    policy += "; connect-src 'self'" if live else ""
    scripts = [_asset("report.js"), *([_asset("live.js")] if live else [])]
    shown = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{shown} · steploop</title>'
        f"<style>{_asset('report.css')}</style></head>\n<body><main><h1>{shown}</h1>{body}</main>\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    return _one_result(runs[0]) if len(runs) == 1 else _many_results(runs, names)


def tile(value: object, what: str, note: str = "", *, first: bool = False) -> str:
    """A number in large type, and what it is."""
    small = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<div class="tile{" first" if first else ""}"><p class="value">{text(value)}</p><p>{text(what)}</p>{small}</div>'


def _one_result(run: RunRecord) -> str:
    result = result_of(run)
    tiles = []
    if result is not None:
        at = (
            f"in epoch {result.epoch}, at step {result.step:,}"
            if result.epoch is not None
            else f"at step {result.step:,}"
        )
        words = f"{'best' if result.is_best else 'last'} {result.metric.replace('_', ' ')}"
        tiles.append(tile(value_text(result.value), words, at, first=True))
        tiles += [
            tile(value_text(v), k.replace("_", " "), "of the same evaluation")
            for k, v in result.metrics.items()
            if k != result.metric
        ]
    elif run.train:
        tiles.append(
            tile(
                value_text(run.train[-1].get("loss")),
                "last training loss",
                "nothing was evaluated",
                first=True,
            )
        )
    share = f"{run.skipped / run.attempted:.1%} of those attempted" if run.attempted and run.skipped else ""
    tiles += [
        tile(f"{run.steps:,}", "optimizer steps"),
        tile(f"{run.skipped:,}", "skipped steps", share),
        tile(duration(run.time_s), "time"),
    ]
    badge = f'<p class="outcome {html.escape(run.state)}">{text(outcome(run))}</p>'
    return (
        f'<section class="result" aria-label="Result">{badge}<div class="tiles">{"".join(tiles)}</div>'
        f"{_unread(run)}</section>"
    )


def _unread(run: RunRecord, name: str = "") -> str:
    """What could not be read of a run, as notes."""
    lines = [f"{run.damaged_lines} lines of metrics.jsonl could not be read."] if run.damaged_lines else []
    start = f"{name}: " if name else ""
    return "".join(
        f'<p class="note">{text(start + safe_text(problem))}</p>' for problem in (*run.problems, *lines)
    )


def _many_results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    different = [key for key in differences(runs) if key != "recipe"]
    metrics = list(dict.fromkeys(m for run in runs for m in run.metrics))
    rows = []
    for i, run in enumerate(runs):
        result = result_of(run)
        own = [value_text(result.metrics[m]) if result and m in result.metrics else "" for m in metrics]
        settings = [short(values[i]) for key, values in differences(runs).items() if key != "recipe"]
        own_name = safe_text(run.name) if different else names[i]
        label = Markup(f'<span class="key line b{i % 8}"></span>{text(own_name)}')
        rows.append(
            [label, *settings, *own, f"{run.steps:,}", f"{run.skipped:,}", duration(run.time_s), run.state]
        )
    head = ["run", *different, *metrics, "steps", "skipped", "time", "state"]
    first = 1 + len(different)
    note = '<p class="note">Metrics are those of the best evaluation of each run, or of its last where none was monitored.</p>'
    shown = table(head, rows, numbers=range(first, first + len(metrics) + 3), label="Results")
    unread = "".join(_unread(run, safe_text(run.name)) for run in runs)
    return section("Result", shown, note, unread)


def _curves(runs: Sequence[RunRecord]) -> str:
    last = max(run.attempted for run in runs)
    figures = [
        chart(panel, many_runs=len(runs) > 1, last_step=last, identity=f"chart-{i}")
        for i, panel in enumerate(arrange(runs))
    ]
    if not figures:
        return section("Curves", "<p>Nothing was logged.</p>")
    note = '<p class="note screen">Over attempted steps. Point at a curve, or focus it and use the arrow keys, to read its values.</p>'
    return section("Curves", note, f'<div class="charts">{"".join(figures)}</div>', identity="curves")


def _pictures(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    shown = []
    for run, name in zip(runs, names, strict=True):
        for picture in run.pictures:
            try:
                content = read_file(picture.parent, picture.name, limit=_MAX_PICTURE_BYTES)
            except DataError:  # larger, or replaced by something else
                continue
            data = base64.b64encode(content or b"").decode()
            what = safe_text(picture.stem).replace("_", " ") + (f" · {name}" if len(runs) > 1 else "")
            shown.append(
                f'<figure class="picture"><img alt="{text(what)}" src="data:image/png;base64,{data}"><figcaption>{text(what)}</figcaption></figure>'
            )
    return (
        section("Pictures that the recipe drew", f'<div class="charts">{"".join(shown)}</div>')
        if shown
        else ""
    )
