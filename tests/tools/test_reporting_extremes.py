"""Reports and figures of numbers and names as odd as a log may hold them: drawn, or left out as a gap, never a traceback."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steploop.runs.reading import Curve, RunRecord
from steploop.runs.record_values import checked_line
from steploop.tools.report.charts import nice_ticks
from steploop.tools.report.curve_points import drawable
from steploop.tools.report.figures import draw_panels, save
from steploop.tools.report.pages import report
from steploop.tools.report.panels import arrange
from steploop.tools.report.terminal_plots import draw_grid

names = st.sampled_from(["loss", "loss_scale", "grad_norm", "learning_rate", "layer_norm/a"]) | st.text(
    max_size=20
)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**999), 2**999)
steps = st.integers(0, 2**53 - 1)


@st.composite
def records(draw):
    """A run with a curve of any numbers under any name, in its training and in its evaluations."""
    name, values = draw(names), draw(st.lists(st.tuples(steps, numbers), min_size=1, max_size=6))
    train = [
        checked_line({"kind": "train", "attempted": at, "step": at, name: value})
        for at, value in sorted(values, key=lambda v: v[0])
    ]
    evals = [
        checked_line({"kind": "eval", "attempted": at, "metrics": {name: value}}) for at, value in values
    ]
    lines = [[line for line in some if line is not None] for some in (train, evals)]
    return RunRecord(path=Path("run"), train=tuple(lines[0]), evals=tuple(lines[1]))


@given(records())
def test_a_report_of_any_numbers_is_written(record):
    page = report([record])
    page.encode()
    assert "nan" not in page.partition('class="charts"')[2].partition("<section")[0].replace("nance", "")


@given(records())
def test_any_numbers_are_drawn_in_the_terminal(record):
    curves = {panel.title: series.curve.values for panel in arrange([record]) for series in panel.series}
    if curves:
        draw_grid(curves, same_scale=False)


@settings(max_examples=5)
@given(records())
def test_any_numbers_are_drawn_by_matplotlib(tmp_path_factory, record):
    panels = arrange([record])
    if panels:
        save(draw_panels(panels, record.recipe), tmp_path_factory.mktemp("odd") / "curves")


@pytest.mark.parametrize("name", ["$\\frac$", "a_b$", "<b>&", "$x$ $", "_hidden"])
def test_a_name_is_no_formula(name, tmp_path):
    """matplotlib would read what stands between two dollars as TeX."""
    line = checked_line({"kind": "eval", "attempted": 1, "metrics": {name: 1.0}})
    _, svg = save(draw_panels(arrange([RunRecord(path=tmp_path, evals=(line,))]), name), tmp_path / "curves")
    shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f">{shown}</text>" in svg.read_text()


def test_a_curve_without_a_finite_value_stands_between_others():
    drawn = draw_grid({"a": (1.0, 2.0), "b": (None, None), "c": (3.0, 1.0)}, width=120)
    assert "(no finite values)" in drawn
    assert len(drawn.splitlines()) == len(draw_grid({"a": (1.0, 2.0)}).splitlines())


def test_a_value_beyond_all_measure_is_a_gap():
    values = (1e308, 1.0, 5e-324, 0.0, -1e308, None, -2.0)
    drawn = drawable(Curve(tuple(range(7)), values))
    assert drawn.values == (None, 1.0, 0.0, 0.0, None, None, -2.0)


@given(st.floats(-1e100, 1e100), st.floats(-1e100, 1e100))
def test_ticks_lie_within_their_range(low, high):
    ticks = nice_ticks(low, high)
    assert ticks
    assert all(math.isfinite(t) for t in ticks)
    assert len(ticks) <= 12
