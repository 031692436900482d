"""Make the lower half of a report: evaluations, events, time, what ran, the recipe."""

from collections.abc import Sequence
from typing import Any

from steploop.runs.reading import RunRecord
from steploop.runs.safe_text import safe_text
from steploop.tools.report.charts import number
from steploop.tools.report.markup import Markup, definitions, folded, section, text
from steploop.tools.report.results import duration, epoch_of, how_to_reproduce, phases
from steploop.tools.report.run_labels import short
from steploop.tools.report.source_html import highlighted

__all__ = [
    "evaluations",
    "events",
    "label_of",
    "recipe_sources",
    "reproduce",
    "times",
    "value_text",
    "what_ran",
]

_MAX_ROWS = 200  # of the tables of evaluations and events


def label_of(names: Sequence[str], index: int) -> Markup:
    """A run's label with the colour that its curves have."""
    return Markup(f'<span class="key line b{index % 8}"></span>{text(names[index])}')


def value_text(value: Any) -> str:
    """A number of an evaluation, or that it is none."""
    return number(float(value)) if isinstance(value, (int, float)) else "not finite"


def evaluations(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """All evaluations, run by run."""
    parts = []
    for i, run in enumerate(runs):
        if not run.evals:
            continue
        head = ["epoch", "step", *run.metrics, "time", ""]
        rows = [
            [
                "" if (epoch := epoch_of(line)) is None else str(epoch),
                f"{line.get('step', 0):,}",
                *(value_text(line.get("metrics", {}).get(m)) for m in run.metrics),
                duration(float(line.get("time_s", 0.0))),
                Markup('<span class="best">best so far</span>') if line.get("best") else "",
            ]
            for line in run.evals[-_MAX_ROWS:]
        ]
        title = f"<h3>{label_of(names, i)}</h3>" if len(runs) > 1 else ""
        cut = (
            f'<p class="note">The last {_MAX_ROWS} of {len(run.evals)}.</p>'
            if len(run.evals) > _MAX_ROWS
            else ""
        )
        label = f"Evaluations of {names[i]}"
        shown = folded(
            head, rows, numbers=range(len(run.metrics) + 3), label=label, what="evaluations", last=True
        )
        parts.append(title + shown + cut)
    return section("Evaluations", *parts)


def events(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Skipped steps and other events."""
    rows: list[list[object]] = []
    for i, run in enumerate(runs):
        for event in run.events[:_MAX_ROWS]:
            kind = short(event.get("event", "?"))
            if kind == "checkpoint" or "batch_form" in event:  # as regular as the epochs: no news
                continue
            known = {"kind", "event", "step", "attempted", "epoch", "batch", "time_s"}
            details = ", ".join(
                f"{k.replace('_', ' ')} {short(v)}"
                for k, v in event.items()
                if k not in known and v is not None
            )
            at = event.get("attempted", event.get("step", ""))
            place = (
                f"epoch {event['epoch']}, batch {event['batch']}"
                if {"epoch", "batch"} <= event.keys()
                else ""
            )
            label = [label_of(names, i)] if len(runs) > 1 else []
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
        "Skipped steps and events",
        folded(head, rows, numbers=[len(head) - 3], label="Events", what="events", last=False),
        replay,
    )


def times(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Where the time went."""
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


def what_ran(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Recipe, Config, data, device, versions."""
    parts = []
    for i, run in enumerate(runs):
        recipe = run.config.get("recipe")
        facts: dict[str, object] = {"recipe": run.recipe, "directory": safe_text(run.path)}
        if isinstance(recipe, dict):
            facts |= {"file": safe_text(recipe.get("path") or ""), "SHA-256": recipe.get("sha256")}
        for key in ("data", "device", "precision", "compile", "git_commit", "steploop"):
            facts[key.replace("_", " ")] = run.config.get(key)
        for key in ("versions", "tuning"):
            facts[key] = ", ".join(f"{k} {short(v)}" for k, v in run.config.get(key, {}).items())
        fields = {key: short(value) for key, value in run.fields.items()}
        title = f"<h3>{label_of(names, i)}</h3>" if len(runs) > 1 else ""
        config = f"<h4>Config</h4>{definitions(fields)}" if fields else ""
        parts.append(f"{title}{config}<h4>Run</h4>{definitions(facts)}")
    return section("What ran", *parts)


def reproduce(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The commands that do it again."""
    parts = []
    for i, run in enumerate(runs):
        lines = "\n".join(how_to_reproduce(run))
        if lines:
            title = f"<h3>{label_of(names, i)}</h3>" if len(runs) > 1 else ""
            parts.append(
                f'{title}<pre class="shell" tabindex="0" role="region" aria-label="Commands"><code>{text(lines)}</code></pre>'
            )
    return section("How to reproduce it", *parts)


def recipe_sources(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """The source of each recipe, once."""
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
