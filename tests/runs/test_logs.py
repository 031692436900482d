"""Where the numbers of a run go: strict JSON lines, CSV, TensorBoard, and loggers that fail."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploop.errors import CheckpointWriteError
from steploop.runs.logs import CsvTable, JsonLines, Loggers, TensorBoard, read_json_lines
from steploop.runs.logs.jsonl import encode

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
    lines({"attempted": 1})
    lines({"attempted": 2, "metrics": {"loss": math.nan}})
    lines.close()
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"attempted": 3, "lo')
    expected = [{"attempted": 1}, {"attempted": 2, "metrics": {"loss": None}, "nonfinite": ["metrics.loss"]}]
    assert list(read_json_lines(tmp_path / "m.jsonl")) == expected
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []


def test_lines_that_will_be_written_again_are_dropped(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for n in range(5):
        lines({"attempted": n})
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"attempted": 9')
    lines.keep(lambda line: line["attempted"] <= 2)
    lines({"attempted": 3})
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
