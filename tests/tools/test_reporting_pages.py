"""The HTML report: what it says, that it needs no network, and that nothing in it can break out of it."""

import json
import re
from html.parser import HTMLParser

import pytest
from sample_runs import make_run

from steploop.errors import ConfigError
from steploop.runs.reading import Curve, read_run
from steploop.tools.commands.report import report as report_command
from steploop.tools.commands.runs import runs as runs_command
from steploop.tools.report.charts import nice_ticks, number
from steploop.tools.report.curve_points import thinned
from steploop.tools.report.pages import report
from steploop.tools.report.source_html import highlighted

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Strict(HTMLParser):
    """Elements opened and closed in order, the text of the page, and every address in it."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.addresses, self.identities = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in {"src", "href", "action", "srcset", "poster", "data"}]
        self.identities += [v for k, v in attrs if k == "id"]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def parsed(page):
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def page_of(*runs):
    return report([read_run(run) for run in runs])


def test_the_page_says_what_the_run_was(tmp_path):
    page = page_of(make_run(tmp_path / "a", layers=True))
    text = parsed(page).text
    for words in (
        "Finished.", "best loss", "in epoch 4, at step 240", "0.9748accuracy", "237optimizer steps", "1.2% of those attempted",
        "two moons, 1,000 points drawn from the seed", "torch 2.14.1", "0123456789abcdef", "batch_size64", "best so far",
        "waiting for data", "pip install steploop==0.1.0 torch==2.14.1", "def objective(model, batch):", "skipped steps (3)",
        "before clipping", "after clipping", "Gradient norm per layer group", "steploop replay CAPSULE",
    ):  # fmt: skip
        assert words in text


def test_the_result_comes_first_and_the_recipe_last(tmp_path):
    page = page_of(make_run(tmp_path / "a"))
    places = [
        page.index(words)
        for words in (
            "best loss",
            "<h2>Curves",
            "<h2>Evaluations",
            "<h2>Skipped",
            "<h2>Time per",
            "<h2>What ran",
            "<h2>How to reproduce",
            "<h2>The recipe",
        )
    ]
    assert places == sorted(places)


def test_the_page_fetches_nothing(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = page_of(run)
    assert all(address.startswith("data:image/png;base64,") for address in parsed(page).addresses)
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_text_of_a_run_cannot_become_markup(tmp_path):
    run = make_run(tmp_path / "a")
    config = json.loads((run / "config.json").read_text())
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    config["config"]["note"] = evil
    config["recipe"]["name"] = evil
    config["data"] = evil
    (run / "config.json").write_text(json.dumps(config))
    (run / "recipe.py").write_text(f"x = '{evil}'\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "event": evil, "attempted": 240, "why": evil}) + "\n")
        file.write(
            json.dumps({"kind": "train", "step": 238, "attempted": 241, evil: 1.0, "time_s": 9.0}) + "\n"
        )
    page = page_of(run, make_run(tmp_path / "b"))
    assert "<script>alert" not in page
    assert "<img" not in page
    assert parsed(page).addresses == []


def test_every_identity_in_the_page_is_unique(tmp_path):
    identities = parsed(page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.03))).identities
    assert len(identities) == len(set(identities)) > 5


def test_runs_are_compared_by_what_differs(tmp_path):
    text = parsed(page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.03))).text
    assert "two_moons: 2 runs" in text
    assert "lr=0.1 · training" in text
    assert "lr=0.03 · evaluation" in text
    assert text.count("def objective(model, batch):") == 1  # one recipe is shown once


def test_every_point_of_a_short_run_is_in_the_page_and_gaps_are_null(tmp_path):
    page = page_of(make_run(tmp_path / "a", steps=40, bad_loss_at=(5, 6), skipped=()))
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page).group(1))
    loss = data["s"][0]
    assert len(loss["x"]) == 40
    assert loss["y"][5] is None
    path = re.search(r'<path class="s line c0" d="([^"]*)"', page).group(1)
    assert path.count("M") == 2  # the line is taken up again behind the gap


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", "nonsense"])
def test_a_run_in_any_state_has_a_page(tmp_path, state):
    parsed(page_of(make_run(tmp_path / "a", state=state)))


def test_a_run_that_logged_nothing_has_a_page(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "metrics.jsonl").unlink()
    assert "Nothing was logged." in parsed(page_of(run)).text
    (run / "status.json").unlink()
    (run / "recipe.py").unlink()
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "attempted": 1, "loss": None, "nonfinite": ["loss"]}) + "\n"
    )
    (run / "config.json").unlink()
    parsed(page_of(run))


def test_no_run_is_no_report():
    with pytest.raises(ConfigError, match="expected at least one run directory"):
        report([])


def test_a_long_run_stays_a_light_page_and_keeps_its_peaks():
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 99.0, None
    thin = thinned(Curve(tuple(range(100_000)), tuple(values)))
    assert len(thin) <= 810
    assert 99.0 in thin.values
    assert (thin.steps[0], thin.steps[-1]) == (0, 99_999)
    assert list(thin.steps) == sorted(set(thin.steps))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.13), (-3, 7), (0, 123456), (1e-6, 3e-6), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.123456, "0.1235"),
        (1234.5, "1,234"),
        (123456.7, "1.23e+05"),
        (0.00001, "1e-05"),
        (54321.0, "54,321"),
    ],
)
def test_numbers_have_four_figures(value, text):
    assert number(value) == text


def test_source_is_coloured_and_stays_itself():
    source = 'def f(x):  # <b>\n    """Two\n    lines."""\n    return x + 1.5\n'
    page = highlighted(source)
    parser = Strict()
    parser.feed(page)
    assert "".join(parser.words) == source.rstrip("\n")
    assert '<span class="tk">def</span>' in page
    assert '<span class="tc"># &lt;b&gt;</span>' in page
    assert '<span class="tn">1.5</span>' in page
    assert page.count('class="line"') == 4
    broken = Strict()
    broken.feed(highlighted("def f(:\n  '''"))
    assert "".join(broken.words) == "def f(:\n  '''"


def test_the_command_writes_the_file_and_says_where(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    report_command([run])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    parsed((run / "report.html").read_text())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        report_command([run], out=tmp_path / "file" / "report.html")


def test_the_table_of_runs(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", lr=0.03, skipped=(), state="interrupted")
    runs_command(tmp_path)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "recipe", "differs", "in", "metric", "steps", "time", "state"]
    assert first.split() == [
        str(tmp_path / "a"),
        "two_moons",
        "lr=0.1",
        "loss",
        "0.3456",
        "237",
        "(+3",
        "skipped)",
        "3.84",
        "s",
        "finished",
    ]
    assert second.split()[-1] == "interrupted"
    runs_command(tmp_path, as_json=True)
    entries = json.loads(capsys.readouterr().out)
    assert [entry["config"]["lr"] for entry in entries] == [0.1, 0.03]
    assert entries[0]["skipped"] == 3
    assert entries[0]["metric"] == "loss"
    (tmp_path / "empty").mkdir()
    runs_command(tmp_path / "empty")
    assert capsys.readouterr().out == f"There are no runs below {tmp_path / 'empty'}.\n"
