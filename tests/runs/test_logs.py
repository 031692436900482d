"""Where the numbers of a run go: strict JSON lines, CSV, TensorBoard, and loggers that fail."""

import json
import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import changed, train

from steploop.errors import CheckpointWriteError, ConfigError
from steploop.runs.journal import LoggedSteps
from steploop.runs.logs import CsvTable, JsonLines, Loggers, TensorBoard, read_json_lines
from steploop.runs.logs.jsonl import encode
from steploop.runs.record_values import is_whole_line

numbers = st.floats() | st.integers(-(2**53), 2**53) | st.none() | st.booleans()
objects = st.dictionaries(
    st.text(max_size=5), numbers | st.dictionaries(st.text(max_size=5), numbers, max_size=3), max_size=5
)


def refuse(constant):
    raise AssertionError(constant)


@given(objects)
def test_a_line_is_strict_json_and_names_what_it_cannot_hold(line):
    line = {key: value for key, value in line.items() if key != "nonfinite"}
    text = encode(line)
    assert text.count(b"\n") == 1
    back = json.loads(text, parse_constant=refuse)
    flat = {(k,): v for k, v in line.items() if not isinstance(v, dict)}
    flat |= {(k, j): v for k, inner in line.items() if isinstance(inner, dict) for j, v in inner.items()}
    bad = [".".join(key) for key, v in flat.items() if isinstance(v, float) and not math.isfinite(v)]
    assert sorted(back.pop("nonfinite", [])) == sorted(bad)
    for key, value in flat.items():
        found = back[key[0]] if len(key) == 1 else back[key[0]][key[1]]
        assert found == (None if isinstance(value, float) and not math.isfinite(value) else value)


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines({"kind": "event", "attempted": 1})
    lines({"kind": "event", "attempted": 2, "metrics": {"loss": math.nan}})
    lines.close()
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"attempted": 3, "lo')
    with (tmp_path / "m.jsonl").open("ab") as file:  # and what a damaged disk made of others
        file.write(
            b'\n{"attempted": 4}\n{"kind": "train", "step": 1}\n{"kind": "event", "x": "\\ud800"}\n'
            + b"[" * 9999
            + b"\n"
        )
    numbers = {"metrics": {"loss": None}, "nonfinite": ["metrics.loss"]}
    expected = [{"kind": "event", "attempted": 1}, {"kind": "event", "attempted": 2} | numbers]
    found = list(read_json_lines(tmp_path / "m.jsonl"))
    assert [line for line in found if is_whole_line(line)] == expected
    assert found == [*expected, {"attempted": 4}, {"kind": "train", "step": 1}]
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


def test_lines_that_will_be_written_again_are_dropped(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for n in range(5):
        lines({"kind": "event", "attempted": n})
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"attempted": 9')
    lines.keep(lambda line: line["attempted"] <= 2)
    lines({"kind": "event", "attempted": 3})
    lines.close()
    assert [line["attempted"] for line in read_json_lines(tmp_path / "m.jsonl")] == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_file_that_cannot_be_written_is_a_typed_error(tmp_path):
    with pytest.raises(CheckpointWriteError, match="cannot be written: Is a directory") as caught:
        JsonLines(tmp_path)
    assert caught.value.errno is not None


class Failing:
    def __init__(self, after):
        self.after, self.steps, self.closed = after, [], False

    def __call__(self, step, values):
        if len(self.steps) == self.after:
            raise OSError("the server is gone")
        self.steps.append(step)

    def close(self):
        self.closed = True


def test_a_logger_that_fails_is_reported_once_and_the_others_go_on():
    said, bad, good = [], Failing(2), Failing(100)
    loggers = Loggers([bad, good], said.append)
    for step in range(5):
        loggers(step, {"loss": 1.0})
    loggers.close()
    assert (bad.steps, good.steps) == ([0, 1], [0, 1, 2, 3, 4])
    assert said == ["The logger Failing failed and is left out from here on: OSError: the server is gone"]
    assert good.closed


def test_what_stands_of_a_table_takes_the_place_of_all_that_was_there(tmp_path):
    table = CsvTable(tmp_path / "m.csv")
    table(1, {"loss": 0.5})
    table(2, {"loss": 0.25, "gone": 1.0})
    calls = []

    class Other:
        """A logger that cannot take back what it has drawn, and one that fails at it."""

        def __call__(self, step, values):
            calls.append(step)

        def close(self):
            pass

    class Failing(Other):
        def rewrite(self, rows):
            raise OSError("the disk is full")

    said = []
    loggers = Loggers([Failing(), Other(), table], said.append)
    loggers.rewrite(iter([(1, {"loss": 0.5}), (1, {"accuracy": 0.75})]))
    loggers(2, {"loss": 0.25})
    assert (tmp_path / "m.csv").read_text().splitlines() == [
        "step,loss,accuracy",
        "1,0.5,",
        "1,,0.75",
        "2,0.25,",
    ]
    assert said == ["The logger Failing failed and is left out from here on: OSError: the disk is full"]
    assert calls == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]
    CsvTable(tmp_path / "other.csv").rewrite([])
    assert (tmp_path / "other.csv").read_text().splitlines() == ["step"]


def test_a_csv_table_grows_columns_and_is_continued(tmp_path):
    table = CsvTable(tmp_path / "m.csv")
    table(1, {"loss": 0.5})
    table(2, {"loss": 0.25, "lr": 0.1})
    CsvTable(tmp_path / "m.csv")(3, {"lr": 0.2})
    assert (tmp_path / "m.csv").read_text().splitlines() == ["step,loss,lr", "1,0.5,", "2,0.25,0.1", "3,,0.2"]


def test_tensorboard_files_hold_the_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    for step in range(3):
        board(step, {"train/loss": 1.0 / (step + 1)})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (0, 1.0),
        (1, 0.5),
        (2, pytest.approx(1 / 3)),
    ]


@pytest.mark.parametrize("kept", [0, 1, 3, 5])
def test_tensorboard_shows_no_step_twice_after_a_resume(kept, tmp_path):
    """Steps up to ``kept`` stand; those after them are taken again."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = [(step, {"train/loss": float(step), "eval/loss": step / 2}) for step in range(1, 6)]
    killed = TensorBoard(tmp_path)
    for row in rows:
        killed(*row)
    killed.flush()  # and no close
    resumed = TensorBoard(tmp_path)
    resumed.rewrite(rows[:kept])
    for row in rows[kept:]:
        resumed(*row)
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for tag in ("train/loss", "eval/loss"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(step, row[tag]) for step, row in rows]


def test_tensorboard_that_is_asked_for_at_a_resume_shows_the_run_from_its_beginning(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board.rewrite([(1, {"loss": 1.0}), (2, {"loss": 0.5})])
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]


@given(
    phases=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5).map(sorted), min_size=1, max_size=4)
)
def test_the_steps_of_a_later_phase_go_on_behind_those_of_the_one_before(phases):
    """Whether all lines come at once, as at a resume, or one by one."""
    written = [
        {"kind": "train", "step": step, "loss": 0.5, **({"phase": number} if number else {})}
        for number, steps in enumerate(phases)
        for step in steps
    ]
    at_once = list(LoggedSteps().read(written))
    one_by_one = LoggedSteps()
    assert [row for line in written for row in one_by_one.read([line])] == at_once
    steps = [step for step, _ in at_once]
    assert steps == sorted(steps)
    ends = [steps[sum(map(len, phases[: n + 1])) - 1] for n in range(len(phases))]
    assert ends == [sum(phase[-1] for phase in phases[: n + 1]) for n in range(len(phases))]


class Recorder:
    """A logger with every method that one may have."""

    def __init__(self):
        self.calls = []

    def __call__(self, step, values):
        self.calls.append((step, sorted(values)))

    def __getattr__(self, name):
        if name in {"begin", "rewrite", "flush", "close"}:
            return lambda *arguments: self.calls.append((name, *arguments))
        raise AttributeError(name)


def test_a_recipe_and_a_run_bring_loggers_of_their_own(tmp_path):
    """A function will do; an object is told where the run is, what stands at a resume, and when to write."""
    own, given, steps = Recorder(), Recorder(), []
    recipe = changed(
        tmp_path, lambda made, _: attrs.evolve(made, loggers=[own, lambda step, _: steps.append(step)])
    )
    train(tmp_path / "run", recipe=recipe, stop_at=5, loggers=[given])
    assert own.calls == given.calls
    assert own.calls[0] == ("begin", tmp_path / "run")
    assert own.calls[-2:] == [("flush",), ("close",)]
    first = [call for call in own.calls if isinstance(call[0], int)]
    assert [call[0] for call in first] == steps
    assert {"train/loss", "train/learning_rate"} <= set(first[0][1])
    own.calls.clear()
    train(tmp_path / "run", resume=True)
    assert own.calls[0] == ("begin", tmp_path / "run")
    assert own.calls[1][0] == "rewrite"
    assert [step for step, _ in own.calls[1][1]] == steps[: len(first)]


@pytest.mark.parametrize(
    ("loggers", "said"),
    [
        (print, "loggers must be a sequence of loggers, but is one"),
        (5, "a logger is called as logger(step, values), but 5 cannot be called"),
        ([print, "tensorboard"], "but 'tensorboard' cannot be called"),
        ([Recorder], "is a class: give an instance"),
    ],
)
def test_what_is_no_logger_is_refused_when_the_recipe_is_made(loggers, said, tmp_path):
    recipe = changed(tmp_path, lambda made, _: attrs.evolve(made, loggers=loggers))
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", recipe=recipe)
    assert said in str(caught.value)
