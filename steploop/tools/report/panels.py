"""Arrange the curves of runs in panels, for every kind of drawing."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

from steploop.errors import ConfigError
from steploop.runs.reading import Curve, RunRecord
from steploop.tools.report.curve_points import drawable, smoothed
from steploop.tools.report.run_labels import labels

__all__ = ["Panel", "Series", "arrange", "select"]

Style = Literal["line", "faint", "dashed", "points"]
Scale = Literal["linear", "log"]


@attrs.frozen
class Series:
    """A curve of a panel.

    Attributes:
        label: what the legend calls it.
        run: index of the run that it belongs to: its colour.
        curve: its points; values beyond 1e100 are gaps, those closer to 0 than 1e-100 are 0.
        style: "line"; "faint" for noise behind a line; "dashed" for a second line of a pair; "points" joined by a
            line, for what is measured now and then.
    """

    label: str
    run: int
    curve: Curve = attrs.field(converter=drawable)
    style: Style = "line"


@attrs.frozen(kw_only=True)
class Panel:
    """A set of axes.

    Attributes:
        key: what ``--metric`` calls it.
        title: what it shows.
        unit: of the vertical axis, or "".
        scale: of the vertical axis.
        series: its curves.
        marks: (run, attempted step) of the steps that were skipped, where the panel shows them.
        note: how to read it, if that needs a word.
    """

    key: str
    title: str
    unit: str = ""
    scale: Scale = "linear"
    series: tuple[Series, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()
    note: str = ""


_MANY = 100  # points of a curve from which on it is smoothed
_SMOOTHED = "Smoothed: each point is the mean of those around it, a fiftieth of all."
_PALE = " The pale line has every point."
_ALL_FIXED: Mapping[str, tuple[str, str, Scale]] = {
    "loss": ("Loss", "", "linear"),
    "learning_rate": ("Learning rate", "", "linear"),
    "momentum": ("Momentum", "", "linear"),
    "grad_norm": ("Gradient norm", "L2 norm", "log"),
    "loss_scale": ("Loss scale", "", "log"),
    "samples_per_s": ("Throughput", "samples / s", "linear"),
    "data_wait": ("Waiting for data", "share of the time", "linear"),
}
# shares and rates mean something only against nothing
FROM_ZERO = frozenset({"learning_rate", "samples_per_s", "data_wait"})
# shown in other panels, or only in the text of a report
_ELSEWHERE = frozenset({"clipped_norm"})
_LAYERS = "layer_norm/"


def _split(key: str) -> tuple[str, str]:
    """("generator", "loss") of "generator.loss"; ("", "loss") of "loss"."""
    if key.startswith(_LAYERS):
        return "", key
    part, _, name = key.rpartition(".")
    return part, name


def _named(run_label: str, part: str, what: str, *, many: bool) -> str:
    words = [run_label if many else "", part, what]
    return " · ".join(word for word in words if word)


def _train_series(
    runs: Sequence[RunRecord], names: Sequence[str], name: str, *, smooth: bool, what: str = ""
) -> list[Series]:
    found: list[Series] = []
    for index, run in enumerate(runs):
        for key in run.train_keys():
            part, own = _split(key)
            if own != name:
                continue
            curve = run.train_curve(key)
            if all(v is None for v in curve.values):
                continue
            label = _named(names[index], part, what, many=len(runs) > 1)
            if smooth and len(curve) >= _MANY:
                found.append(Series(f"{label} (each)" if label else "each", index, curve, "faint"))
                curve = smoothed(curve)
            found.append(Series(label, index, curve))
    return found


def _eval_series(runs: Sequence[RunRecord], names: Sequence[str], metric: str) -> list[Series]:
    curves = [(index, run.eval_curve(metric)) for index, run in enumerate(runs) if metric in run.metrics]
    many = len(runs) > 1
    return [
        Series(_named(names[i], "", "evaluation", many=many), i, c, "points") for i, c in curves if len(c)
    ]


def _norm_series(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Series]:
    before = _train_series(runs, names, "grad_norm", smooth=False, what="before clipping")
    after = _train_series(runs, names, "clipped_norm", smooth=False, what="after clipping")
    by_place = {(s.run, s.label.replace("before", "after")): s.curve for s in before}
    # where nothing was clipped the second line would only hide the first
    changed = [s for s in after if by_place.get((s.run, s.label)) != s.curve]
    if not changed:
        return _train_series(runs, names, "grad_norm", smooth=False)
    return before + [attrs.evolve(s, style="dashed") for s in changed]


def _layer_series(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Series]:
    found = []
    for index, run in enumerate(runs):
        for key in run.train_keys():
            if key.startswith(_LAYERS):
                label = _named(names[index], key.removeprefix(_LAYERS), "", many=len(runs) > 1)
                found.append(Series(label, index, smoothed(run.train_curve(key))))
    return found


def _other(key: str) -> tuple[str, str, Scale]:
    """Title, unit and scale of a metric of the user's."""
    return key.replace("_", " ").capitalize(), "", "linear"


def arrange(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels that have something to show: loss, metrics, learning rate, gradient norms, loss scale, throughput."""
    names = labels(runs)
    marks = tuple((index, step) for index, run in enumerate(runs) for step in run.skipped_steps())
    metrics = list(dict.fromkeys(m for run in runs for m in run.metrics if m != "loss"))
    train_names = dict.fromkeys(
        _split(k)[1] for run in runs for k in run.train_keys() if not k.startswith(_LAYERS)
    )
    metrics += [n for n in train_names if n not in {*_ALL_FIXED, *_ELSEWHERE, *metrics}]
    found: list[Panel] = []

    def add(key: str, series: list[Series]) -> None:
        title, unit, scale = _ALL_FIXED.get(key, _other(key))
        if series:
            shown = marks if key in {"loss", "loss_scale"} else ()
            note = _SMOOTHED + _PALE if any(s.style == "faint" for s in series) else ""
            found.append(
                Panel(
                    key=key, title=title, unit=unit, scale=scale, series=tuple(series), marks=shown, note=note
                )
            )

    add(
        "loss",
        _train_series(runs, names, "loss", smooth=True, what="training") + _eval_series(runs, names, "loss"),
    )
    for metric in metrics:
        add(
            metric,
            _train_series(runs, names, metric, smooth=True, what="training")
            + _eval_series(runs, names, metric),
        )
    add("learning_rate", _train_series(runs, names, "learning_rate", smooth=False))
    add("momentum", _train_series(runs, names, "momentum", smooth=False))
    add("grad_norm", _norm_series(runs, names))
    add("loss_scale", _train_series(runs, names, "loss_scale", smooth=False))
    if layers := _layer_series(runs, names):
        title = "Gradient norm per layer group"
        note = _SMOOTHED if any(len(s.curve) >= _MANY for s in layers) else ""
        found.append(
            Panel(
                key="layer_norms", title=title, unit="L2 norm", scale="log", series=tuple(layers), note=note
            )
        )
    add("samples_per_s", _train_series(runs, names, "samples_per_s", smooth=True))
    add("data_wait", _train_series(runs, names, "data_wait", smooth=True))
    return found


def select(found: Sequence[Panel], wanted: Sequence[str]) -> list[Panel]:
    """The panels that ``--metric`` asks for, in its order; all where it asks for none.

    Raises:
        ConfigError: a name is none of them; says the nearest.
    """
    by_key = {panel.key: panel for panel in found}
    for name in wanted:
        if name not in by_key:
            near = difflib.get_close_matches(name, by_key, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"There is nothing named {name!r} to plot. {hint}There are: {', '.join(by_key) or 'no curves at all'}."
            )
    return [by_key[name] for name in wanted] if wanted else list(found)
