"""metrics.jsonl and status.json when the system cuts a write short or the disk is full for a while."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import POINTS, lines, train

from steploop import read_run
from steploop.runs.directory import RunDirectory, Status
from steploop.runs.logs.jsonl import JsonLines, encode, read_json_lines
from steploop.runs.outlets import Outlets

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files apart by /proc")
FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Stands in for os.write: each call for a log takes all or some bytes, or finds the disk full, as the list says."""

    def __init__(self, outcomes, write=os.write):
        self.outcomes, self.write = list(outcomes), write

    def __call__(self, fd, data):
        if not str(Path(f"/proc/self/fd/{fd}").readlink()).endswith(".jsonl"):
            return self.write(fd, data)
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome == "full":
            raise FULL
        return self.write(fd, data if outcome is None else data[: min(outcome, len(data))])


outcomes = st.lists(st.none() | st.just("full") | st.integers(1, 20), max_size=20)
objects = st.lists(st.fixed_dictionaries({"v": st.integers() | st.text(max_size=8)}), min_size=1, max_size=8)


@given(values=objects, outcomes=outcomes)
def test_whatever_writes_fail_every_line_is_in_the_file_once_there_is_room(
    values, outcomes, tmp_path_factory
):
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steploop.runs.logs.jsonl.os.write", disk := Disk(outcomes))
        log = JsonLines(path)
        for number, value in enumerate(values):
            log(value)
            written = list(read_json_lines(path))
            assert written == values[: len(written)]  # in order, and none in part
            missing = log.missing
            assert (missing["lines"] if missing else 0) == number + 1 - len(written)
        disk.outcomes.clear()
        log.close()
    assert path.read_bytes() == b"".join(map(encode, values))
    assert log.missing is None


def test_what_is_held_back_is_said_once_and_when_it_is_written(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("steploop.runs.logs.jsonl.os.write", Disk([None, "full", "full", 3, "full"]))
    log = JsonLines(tmp_path / "m.jsonl", said.append)
    for value in range(5):
        log({"v": value})
    log.close()
    assert said == [
        f"{tmp_path / 'm.jsonl'} cannot be written: No space left on device. Its lines are kept in memory and written later.",
        f"{tmp_path / 'm.jsonl'} is written again; no line was lost.",
    ]


def test_of_too_many_lines_the_oldest_are_lost_and_counted(tmp_path, monkeypatch):
    """But for one whose beginning is in the file already."""
    said = []
    size = len(encode({"v": 0}))
    monkeypatch.setattr("steploop.runs.logs.jsonl.os.write", disk := Disk([4] + ["full"] * 9))
    log = JsonLines(tmp_path / "m.jsonl", said.append, most_held_bytes=3 * size)
    for value in range(6):
        log({"v": value})
    assert log.missing == {"lines": 6, "reason": "No space left on device"}
    disk.outcomes.clear()
    log.close()
    assert [line["v"] for line in read_json_lines(tmp_path / "m.jsonl")] == [0, 4, 5]
    assert said[-1].endswith("is written again; 3 lines were lost.")
    assert log.missing == {"lines": 3, "reason": "it could not be written for a time"}


def test_a_line_that_a_kill_cut_off_stays_apart_from_the_next(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(encode({"v": 1}) + b'{"v": 2')
    log = JsonLines(tmp_path / "m.jsonl")
    log({"v": 3})
    log.close()
    assert [line["v"] for line in read_json_lines(tmp_path / "m.jsonl")] == [1, 3]


def test_a_log_is_no_link_and_no_pipe(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match="cannot be written") as caught:
            JsonLines(tmp_path / name)
        assert caught.value.errno is not None
    assert not (tmp_path / "victim").exists()


def test_a_run_on_a_disk_that_is_full_for_a_while_ends_with_every_line(tmp_path, monkeypatch):
    """Neither the log nor status.json ends it; the lines are those of a run with a free disk, but for their times."""
    import steploop.runs.directory as module

    train(tmp_path / "free", {"epochs": 1})
    real, calls = module.replace_file, []

    def sometimes(path, data, **options):
        calls.append(path.name)
        if path.name == "status.json" and 2 <= calls.count("status.json") <= 3:
            raise FULL
        real(path, data, **options)

    monkeypatch.setattr(module, "replace_file", sometimes)
    monkeypatch.setattr("steploop.runs.logs.jsonl.os.write", Disk([None, "full", 5, "full", "full", "full"]))
    assert train(tmp_path / "full", {"epochs": 1}).state == "finished"
    timed = {"time_s", "samples_per_s", "data_wait", "eval_s"}
    plain = [
        [{k: v for k, v in line.items() if k not in timed} for line in lines(tmp_path / name)]
        for name in ("free", "full")
    ]
    assert plain[0] == plain[1]
    status = json.loads((tmp_path / "full" / "status.json").read_bytes())
    assert (status["state"], status["lost"]) == ("finished", None)


def test_lines_that_could_never_be_written_are_counted_in_the_status(tmp_path, monkeypatch):
    monkeypatch.setattr("steploop.runs.logs.jsonl.os.write", Disk([None] + ["full"] * 99))
    summary = train(tmp_path / "run", {"epochs": 1}, recipe=POINTS)
    status = json.loads((tmp_path / "run" / "status.json").read_bytes())
    assert status["lost"] == {"lines": 7, "reason": "No space left on device"}
    assert status["metrics"] == summary.metrics
    assert len(lines(tmp_path / "run")) == 1


def test_a_status_that_cannot_be_written_now_is_written_with_the_next(tmp_path, monkeypatch):
    from steploop.runs.logs import Loggers

    status = Status(RunDirectory(tmp_path))
    outlets = Outlets(JsonLines(tmp_path / "m.jsonl"), Loggers([], print), status)
    with monkeypatch.context() as patch:
        patch.setattr("steploop.runs.directory.replace_file", lambda *_, **__: (_ for _ in ()).throw(FULL))
        outlets.say(step=3)
    outlets.say(checkpoint="step-4")
    found = json.loads((tmp_path / "status.json").read_bytes())
    assert (found["step"], found["checkpoint"]) == (3, "step-4")


def test_a_log_that_lacks_lines_does_not_overrule_the_status(tmp_path):
    """Not in a report, nor in a resume that has nothing left to do."""
    summary = train(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    whole = read_run(tmp_path / "run").best()
    kept = [line for line in log.read_bytes().splitlines(keepends=True) if b'"epoch": 1' in line]
    log.write_bytes(b"".join(kept))
    best = read_run(tmp_path / "run").best()
    assert summary.best["epoch"] == 2
    assert (best["step"], best["epoch"], best["metrics"]["loss"]) == (
        whole["step"], whole["epoch"], whole["metrics"]["loss"],
    )  # fmt: skip
    again = train(tmp_path / "run", resume=True)
    assert (again.metrics, again.best) == (summary.metrics, summary.best)
