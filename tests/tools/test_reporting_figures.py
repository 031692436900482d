"""Panels, pictures and terminal drawings: what stands in them."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import make_run

from steploop.errors import ConfigError, MissingExtraError
from steploop.runs.reading import Curve, read_run
from steploop.tools.commands.plot import plot
from steploop.tools.commands.schedules import schedules
from steploop.tools.report.curve_points import smoothed
from steploop.tools.report.panels import arrange, select
from steploop.tools.report.schedule_previews import preview_schedules
from steploop.tools.report.terminal_plots import draw_curve, draw_grid


def panels_of(*runs):
    return {panel.key: panel for panel in arrange([read_run(run) for run in runs])}


def test_a_run_has_a_panel_for_everything_it_logged(tmp_path):
    found = panels_of(make_run(tmp_path / "a", layers=True))
    assert list(found) == [
        "loss", "accuracy", "learning_rate", "grad_norm", "loss_scale", "layer_norms", "samples_per_s", "data_wait",
    ]  # fmt: skip
    assert [s.label for s in found["loss"].series] == ["training (each)", "training", "evaluation"]
    assert [s.label for s in found["grad_norm"].series] == ["before clipping", "after clipping"]
    assert [s.label for s in found["layer_norms"].series] == ["features", "head"]
    assert found["loss_scale"].marks == ((0, 17), (0, 18), (0, 120))


def test_a_run_without_loss_scale_has_no_panel_for_it(tmp_path):
    assert "loss_scale" not in panels_of(make_run(tmp_path / "a", precision="bf16"))


def test_the_curves_of_several_states_stand_side_by_side(tmp_path):
    found = panels_of(make_run(tmp_path / "a", prefix="generator.", every=10))
    assert [s.label for s in found["loss"].series] == ["generator · training", "evaluation"]


def test_the_curves_of_several_runs_are_named_by_their_difference(tmp_path):
    found = panels_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.03))
    assert [(s.run, s.label) for s in found["learning_rate"].series] == [(0, "lr=0.1"), (1, "lr=0.03")]


def test_only_what_was_asked_for_is_drawn_and_a_wrong_name_is_answered(tmp_path):
    found = arrange([read_run(make_run(tmp_path / "a"))])
    assert [p.key for p in select(found, ["accuracy", "loss"])] == ["accuracy", "loss"]
    with pytest.raises(ConfigError) as caught:
        select(found, ["acuracy"])
    assert str(caught.value).startswith(
        "There is nothing named 'acuracy' to plot. Did you mean accuracy? There are: loss, accuracy,"
    )


def test_smoothing_keeps_ends_gaps_and_constants():
    curve = Curve(tuple(range(200)), tuple(1.0 if i != 50 else None for i in range(200)))
    smooth = smoothed(curve)
    assert smooth.values[50] is None
    assert all(v == pytest.approx(1.0) for v in smooth.values if v is not None)
    ramp = Curve(tuple(range(200)), tuple(float(i) for i in range(200)))
    assert smoothed(ramp).values == pytest.approx(ramp.values)  # a mean that is symmetric does not lag
    assert smoothed(Curve((1, 2), (5.0, 7.0))).values == (5.0, 7.0)


@given(
    st.lists(st.floats(-100, 100) | st.just(1e30) | st.none(), min_size=1, max_size=60), st.integers(1, 30)
)
def test_a_smoothed_value_is_the_mean_of_those_around_it_whatever_came_before(values, window):
    """A loss that exploded once does not drown what follows it."""
    smooth = smoothed(Curve(tuple(range(len(values))), tuple(values)), window=window)
    for i, value in enumerate(values):
        reach = min(window // 2, i, len(values) - 1 - i)
        around = [v for v in values[i - reach : i + reach + 1] if v is not None]
        if value is None:
            assert smooth.values[i] is None
        else:
            allowed = 1e-9 * max(map(abs, around))
            assert smooth.values[i] == pytest.approx(
                sum(around) / len(around), rel=1e-9, abs=allowed + 1e-100
            )


def test_a_smoothed_panel_says_how(tmp_path):
    def notes(steps):
        panels = arrange([read_run(make_run(tmp_path / str(steps), steps=steps, layers=True))])
        return {panel.key: panel.note for panel in panels if panel.note}

    assert notes(40) == {}
    said = notes(240)
    assert said["loss"].endswith("a fiftieth of all. The pale line has every point.")
    assert said["layer_norms"].endswith("a fiftieth of all.")
    assert set(said) == {"loss", "layer_norms", "samples_per_s", "data_wait"}


def test_plot_writes_png_and_svg_into_the_run(tmp_path, capsys):
    run = make_run(tmp_path / "a", layers=True)
    plot([run])
    assert capsys.readouterr().out.split() == [str(run / "curves.png"), str(run / "curves.svg")]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    svg = (run / "curves.svg").read_text()
    for text in (
        "Loss",
        "Accuracy",
        "Gradient norm",
        "before clipping",
        "after clipping",
        "skipped steps (3)",
        "features",
    ):
        assert f">{text}<" in svg


def test_the_same_run_gives_the_same_picture(tmp_path):
    run = make_run(tmp_path / "a")
    plot([run], metrics=["loss"], out=tmp_path / "one.svg")
    plot([run], metrics=["loss"], out=tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_several_runs_stand_in_one_picture(tmp_path):
    plot([make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.03)], out=tmp_path / "both")
    svg = (tmp_path / "both.svg").read_text()
    assert ">lr=0.1 · training<" in svg
    assert ">lr=0.03 · training<" in svg


def test_a_run_that_exploded_can_be_drawn(tmp_path):
    run = make_run(tmp_path / "a", steps=8, epochs=2, bad_loss_at=tuple(range(8)))
    plot([run], out=tmp_path / "x")
    assert (tmp_path / "x.png").is_file()


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steploop\[plot\]'"):
        plot([run])


def test_a_terminal_plot_fits_the_window_and_writes_no_file(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "a")
    monkeypatch.setenv("COLUMNS", "70")
    plot([run], terminal=True)
    out = capsys.readouterr().out
    assert "Loss · training" in out
    assert "Loss scale" in out
    assert max(len(line) for line in out.splitlines()) <= 70
    assert not (run / "curves.png").exists()


def test_a_straight_line_is_drawn_straight():
    lines = draw_curve([0.0, 1.0], title="ramp", width=20, height=3, ends=("a", "b"))
    assert [line.rstrip() for line in lines] == [
        "ramp",
        "        1 │      ⣀⠔⠊",
        "          │   ⡠⠔⠊",
        "        0 │⡠⠔⠉",
        "          └─────────",
        "           a       b",
    ]


def test_every_line_of_a_drawing_is_as_wide_as_asked():
    for values in (
        [1.0],
        [1.0, None, math.inf, 2.0],
        [None],
        [5.0] * 500,
        [float(i % 7) for i in range(1000)],
    ):
        lines = draw_curve(values, title="a title that is far too long for this", width=30, height=4)
        assert {len(line) for line in lines} == {30}


def test_a_peak_of_one_point_among_thousands_is_drawn():
    values = [0.0] * 5000
    values[2500] = 1.0
    lines = draw_curve(values, width=40, height=5)
    assert lines[1].split("│")[1].strip() != ""


def test_drawings_stand_side_by_side_as_far_as_they_fit():
    curves = {name: [0.0, 1.0] for name in "abc"}
    assert draw_grid(curves, width=120).splitlines()[0].split() == ["a", "b", "c"]
    assert draw_grid(curves, width=40).splitlines()[0].split() == ["a"]


def test_all_schedules_are_previewed_and_reach_the_highest_rate():
    preview = preview_schedules([], steps=300, lr=0.2)
    assert list(preview.rates) == [
        "constant", "step_lr", "cosine_annealing", "one_cycle", "warmup_cosine", "warmup_stable_decay",
    ]  # fmt: skip
    for values in preview.rates.values():
        assert len(values) == 300
        assert max(values) == pytest.approx(0.2, rel=1e-3)
    assert list(preview.momenta) == ["one_cycle"]


def test_every_schedule_of_the_package_is_previewed():
    import steploop.core.schedules as package

    factories = {name for name in package.__all__ if name.islower()} - {"from_torch"}
    assert set(preview_schedules([], steps=20, lr=1.0).rates) == factories


@pytest.mark.parametrize("steps", [2, 3, 7, 1000])
def test_schedules_of_any_length_can_be_drawn(steps, tmp_path, capsys):
    schedules(steps=steps, out=tmp_path / "s", terminal=True)
    assert "warmup_stable_decay" in capsys.readouterr().out


def test_schedules_are_drawn_as_png_and_svg(tmp_path, capsys):
    schedules(["one_cycle", "constant"], steps=50, out=tmp_path / "s.png")
    assert capsys.readouterr().out.split() == [str(tmp_path / "s.png"), str(tmp_path / "s.svg")]
    svg = (tmp_path / "s.svg").read_text()
    assert ">one_cycle<" in svg
    assert ">step_lr<" not in svg
    with pytest.raises(ConfigError, match=r"There is no schedule 'onecycle'. Did you mean one_cycle\?"):
        schedules(["onecycle"])
