"""The report: one HTML file about one run or several, which opens without a network."""

import base64
import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

from steploop.errors import ConfigError
from steploop.reporting.charts import chart, number
from steploop.reporting.comparing import differences, labels, short
from steploop.reporting.markup import Markup, definitions, section, table, text
from steploop.reporting.panels import arrange
from steploop.reporting.reading import RunRecord
from steploop.reporting.results import duration, epoch_of, how_to_reproduce, outcome, phases, result_of
from steploop.reporting.sources import highlighted

__all__ = ["report"]

_MAX_PICTURE_BYTES = 2_000_000  # of one picture that is put into the page
_MAX_ROWS = 200  # of the tables of evaluations and events


def report(runs: Sequence[RunRecord]) -> str:
    """The page. The result comes first, then what ran, the curves, the evaluations, and how to do it again.

    Raises:
        ConfigError: there is no run to report on.
    """
    if not runs:
        raise ConfigError("report: expected at least one run directory, but got none.")
    names = labels(runs)
    recipes = list(dict.fromkeys(run.recipe for run in runs))
    title = ", ".join(recipes) + (f": {len(runs)} runs" if len(runs) > 1 else "")
    parts = [
        _results(runs, names),
        _curves(runs),
        _pictures(runs, names),
        _evaluations(runs, names),
        _events(runs, names),
        _times(runs, names),
        _what_ran(runs, names),
        _reproduce(runs, names),
        _sources(runs, names),
    ]
    return _page(title, "".join(parts))


def _asset(name: str) -> str:
    return resources.files("steploop.reporting").joinpath("assets", name).read_text(encoding="utf-8")


def _page(title: str, body: str) -> str:
    # the policy is the promise in a form that a browser keeps: nothing is fetched, whatever the page contains
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    shown = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{shown} · steploop</title>'
        f"<style>{_asset('report.css')}</style></head>\n<body><main><h1>{shown}</h1>{body}</main>\n"
        f"<script>{_asset('report.js')}</script></body></html>\n"
    )


def _label(names: Sequence[str], index: int) -> Markup:
    """A run's label with the colour that its curves have."""
    return Markup(f'<span class="key line b{index % 8}"></span>{text(names[index])}')


def _results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    return _one_result(runs[0]) if len(runs) == 1 else _many_results(runs, names)


def _tile(value: object, what: str, note: str = "", *, first: bool = False) -> str:
    small = f'<p class="note">{text(note)}</p>' if note else ""
    return f'<div class="tile{" first" if first else ""}"><p class="value">{text(value)}</p><p>{text(what)}</p>{small}</div>'


def _value(value: Any) -> str:
    return number(float(value)) if isinstance(value, (int, float)) else "not finite"


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
        tiles.append(_tile(_value(result.value), words, at, first=True))
        tiles += [
            _tile(_value(v), k.replace("_", " "), "of the same evaluation")
            for k, v in result.metrics.items()
            if k != result.metric
        ]
    elif run.train:
        tiles.append(
            _tile(
                _value(run.train[-1].get("loss")), "last training loss", "nothing was evaluated", first=True
            )
        )
    share = f"{run.skipped / run.attempted:.1%} of those attempted" if run.attempted and run.skipped else ""
    tiles += [
        _tile(f"{run.steps:,}", "optimizer steps"),
        _tile(f"{run.skipped:,}", "skipped steps", share),
        _tile(duration(run.time_s), "time"),
    ]
    badge = f'<p class="outcome {html.escape(run.state)}">{text(outcome(run))}</p>'
    damaged = (
        f'<p class="note">{run.damaged_lines} lines of metrics.jsonl could not be read.</p>'
        if run.damaged_lines
        else ""
    )
    return f'<section class="result" aria-label="Result">{badge}<div class="tiles">{"".join(tiles)}</div>{damaged}</section>'


def _many_results(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    different = [key for key in differences(runs) if key != "recipe"]
    metrics = list(dict.fromkeys(m for run in runs for m in run.metrics))
    rows = []
    for i, run in enumerate(runs):
        result = result_of(run)
        own = [_value(result.metrics[m]) if result and m in result.metrics else "" for m in metrics]
        settings = [short(values[i]) for key, values in differences(runs).items() if key != "recipe"]
        label = Markup(f'<span class="key line b{i % 8}"></span>{text(run.name if different else names[i])}')
        rows.append(
            [label, *settings, *own, f"{run.steps:,}", f"{run.skipped:,}", duration(run.time_s), run.state]
        )
    head = ["run", *different, *metrics, "steps", "skipped", "time", "state"]
    first = 1 + len(different)
    note = '<p class="note">Metrics are those of the best evaluation of each run, or of its last where none was monitored.</p>'
    shown = table(head, rows, numbers=range(first, first + len(metrics) + 3), label="Results")
    return section("Result", shown, note)


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
            if picture.stat().st_size > _MAX_PICTURE_BYTES:
                continue
            data = base64.b64encode(picture.read_bytes()).decode()
            what = picture.stem.replace("_", " ") + (f" · {name}" if len(runs) > 1 else "")
            shown.append(
                f'<figure class="picture"><img alt="{text(what)}" src="data:image/png;base64,{data}"><figcaption>{text(what)}</figcaption></figure>'
            )
    return (
        section("Pictures that the recipe drew", f'<div class="charts">{"".join(shown)}</div>')
        if shown
        else ""
    )


def _evaluations(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    parts = []
    for i, run in enumerate(runs):
        if not run.evals:
            continue
        head = ["epoch", "step", *run.metrics, "time", ""]
        rows = [
            [
                "" if (epoch := epoch_of(line)) is None else str(epoch),
                f"{int(line.get('step') or 0):,}",
                *(_value(line.get("metrics", {}).get(m)) for m in run.metrics),
                duration(float(line.get("time_s") or 0.0)),
                Markup('<span class="best">best so far</span>') if line.get("best") else "",
            ]
            for line in run.evals[-_MAX_ROWS:]
        ]
        title = f"<h3>{_label(names, i)}</h3>" if len(runs) > 1 else ""
        cut = (
            f'<p class="note">The last {_MAX_ROWS} of {len(run.evals)}.</p>'
            if len(run.evals) > _MAX_ROWS
            else ""
        )
        shown = table(head, rows, numbers=range(len(run.metrics) + 3), label=f"Evaluations of {names[i]}")
        parts.append(title + shown + cut)
    return section("Evaluations", *parts)


def _events(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    rows: list[list[object]] = []
    for i, run in enumerate(runs):
        for event in run.events[:_MAX_ROWS]:
            kind = str(event.get("event", "?"))
            if kind == "checkpoint":  # as regular as the epochs: no news
                continue
            known = {"kind", "event", "step", "attempted", "epoch", "batch", "time_s"}
            details = ", ".join(
                f"{k.replace('_', ' ')} {short(v)}"
                for k, v in event.items()
                if k not in known and v is not None
            )
            at = event.get("attempted", event.get("step", ""))
            place = (
                f"epoch {event['epoch'] + 1}, batch {event['batch']}"
                if {"epoch", "batch"} <= event.keys()
                else ""
            )
            label = [_label(names, i)] if len(runs) > 1 else []
            rows.append([*label, kind.replace("_", " "), str(at), place, details])
    if not rows:
        clean = all(run.skipped == 0 for run in runs)
        return (
            section("Skipped steps and events", "<p>No step was skipped: every gradient was finite.</p>")
            if clean
            else ""
        )
    head = [*(["run"] if len(runs) > 1 else []), "what", "attempted step", "where", ""]
    replay = ""
    if any(run.skipped for run in runs):
        replay = (
            '<p class="note">A skipped step changed neither parameters nor optimizer. '
            "<code>steploop replay CAPSULE</code> runs one again, from the capsules/ directory of the run.</p>"
        )
    return section(
        "Skipped steps and events", table(head, rows, numbers=[len(head) - 3], label="Events"), replay
    )


def _times(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    bars = []
    for i, run in enumerate(runs):
        spent = phases(run)
        if spent.total <= 0:
            continue
        kinds = (
            ("starting", spent.starting, 7),
            ("steps", spent.training, 0),
            ("waiting for data", spent.waiting, 1),
            ("evaluation", spent.evaluation, 2),
        )
        bar = "".join(f'<span class="b{c}" style="flex-grow:{s:.6f}"></span>' for _, s, c in kinds if s > 0)
        legend = "".join(
            f'<li><span class="key line b{c}"></span>{what} {duration(s)} ({s / spent.total:.0%})</li>'
            for what, s, c in kinds
            if s > 0
        )
        title = f"<h3>{text(names[i])}</h3>" if len(runs) > 1 else ""
        bars.append(f'{title}<div class="bar" aria-hidden="true">{bar}</div><ul class="legend">{legend}</ul>')
    return section("Time per phase", *bars)


def _what_ran(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    parts = []
    for i, run in enumerate(runs):
        recipe = run.config.get("recipe")
        facts: dict[str, object] = {"recipe": run.recipe, "directory": run.path}
        if isinstance(recipe, dict):
            facts |= {"file": recipe.get("path"), "SHA-256": recipe.get("sha256")}
        for key in ("data", "device", "precision", "compile", "git_commit", "steploop"):
            facts[key.replace("_", " ")] = run.config.get(key)
        for key in ("versions", "tuning"):
            values = run.config.get(key)
            if isinstance(values, dict):
                facts[key] = ", ".join(f"{k} {short(v)}" for k, v in values.items())
        fields = {key: short(value) for key, value in run.fields.items()}
        title = f"<h3>{_label(names, i)}</h3>" if len(runs) > 1 else ""
        config = f"<h4>Config</h4>{definitions(fields)}" if fields else ""
        parts.append(f"{title}{config}<h4>Run</h4>{definitions(facts)}")
    return section("What ran", *parts)


def _reproduce(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    parts = []
    for i, run in enumerate(runs):
        lines = "\n".join(how_to_reproduce(run))
        if lines:
            title = f"<h3>{_label(names, i)}</h3>" if len(runs) > 1 else ""
            parts.append(
                f'{title}<pre class="shell" tabindex="0" role="region" aria-label="Commands"><code>{text(lines)}</code></pre>'
            )
    return section("How to reproduce it", *parts)


def _sources(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    parts = []
    by_source: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if run.source is not None:
            by_source.setdefault(run.source, []).append(i)
    for source, who in by_source.items():
        whose = ", ".join(names[i] for i in who) if len(by_source) > 1 else runs[who[0]].recipe
        shown = " open" if len(by_source) == 1 else ""
        parts.append(
            f"<details{shown}><summary>{text(whose)} ({len(source.splitlines())} lines)</summary>{highlighted(source)}</details>"
        )
    return section("The recipe", *parts, identity="recipe")
