"""The door to run directories: regular files only, no links, bounded sizes, strict JSON, folders by their number."""

import ast
import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_runs import make_run

import steploop
from steploop.errors import DataError
from steploop.runs.directory_reader import (
    checkpoint_folders,
    parse_object,
    read_file,
    read_record,
    step_folders,
)
from steploop.tools.cli import call


def test_a_file_is_read_whole_and_a_missing_one_is_none(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00bytes\n")
    assert read_file(tmp_path, "a", limit=7) == b"\x00bytes\n"
    assert read_file(tmp_path, "b", limit=7) is None
    assert read_file(tmp_path / "nowhere", "b", limit=7) is None


def test_a_run_directory_may_itself_be_reached_by_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("run")
    assert read_file(tmp_path / "link", "a", limit=7) == b"x"


def make_link(path):
    path.with_name("other").write_text("{}")
    path.symlink_to("other")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_link, "is a link, and links in a run directory are not followed"),
        (lambda path: path.symlink_to(path), "is a link"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link"),
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is no regular file"),
        (make_socket, "cannot be read"),
    ],
    ids=["link", "loop", "device", "fifo", "directory", "socket"],
)
def test_what_is_no_regular_file_is_refused_at_once(make, said, tmp_path):
    make(tmp_path / "status.json")
    with pytest.raises(DataError) as caught:
        read_record(tmp_path, "status.json")
    assert f"{tmp_path}/status.json" in str(caught.value)
    assert said in str(caught.value)


def test_no_more_than_the_limit_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"has more than 1,000 bytes, and no run writes so many"):
        read_file(tmp_path, "a", limit=1000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), json_values, max_size=4),
    st.booleans(),
)
def test_what_python_writes_as_strict_json_is_read_back(value, ascii_only):
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[]", "the outermost value is no object"),
        (b"null", "the outermost value is no object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "the number 1e999 is not finite"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "nested more than 32 levels deep"),
        (b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "nested more than 32 levels deep"),
        ('{"a": 1}'.encode("utf-16"), "codec can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "Unexpected UTF-8 BOM"),
        (b'{"a": "\xff"}', "codec can't decode"),
    ],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_object(text)


def test_checkpoints_are_ordered_by_the_number_of_their_phase_and_step(tmp_path):
    """Not by name, where phase 10 comes before phase 2; links and names that no run writes are left out."""
    names = [
        "checkpoints/step-9",
        "checkpoints/step-000000000010",
        "checkpoints-phase-2/step-1",
        "checkpoints-phase-10/step-1",
    ]
    for name in [
        "checkpoints/step-x",
        "checkpoints/.tmp-step-3",
        "checkpoints-phase-x/step-1",
        "other/step-1",
        *names,
    ]:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-99").symlink_to(tmp_path / "other")
    (tmp_path / "checkpoints-phase-3").symlink_to(tmp_path / "other")
    (tmp_path / "checkpoints" / "step-98").write_text("a file")
    assert checkpoint_folders(tmp_path) == [tmp_path / name for name in names]
    assert step_folders(tmp_path, "checkpoints") == [tmp_path / name for name in names[:2]]
    assert step_folders(tmp_path, "checkpoints-phase-3") == []


READERS = [
    "runs/reading.py", "runs/standing.py", "runs/directory.py", "runs/capsules/capsule_files.py", "tools/report/details.py",
    "tools/report/results.py", "tools/replay/capsule_replay.py",
    *(f"tools/commands/{name}.py" for name in ("runs", "status", "report", "plot", "inspect", "diff", "replay")),
]  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_what_reads_run_directories_opens_no_file_by_its_own_means(name):
    """A second door would have to make all the checks of the first."""
    tree = ast.parse((Path(steploop.__file__).parent / name).read_bytes())
    called = {
        ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    assert not called & {"open", "fdopen", "read_text", "read_bytes", "load_file"}


@pytest.mark.parametrize("name", ["config.json", "recipe.py", "status.json", "metrics.jsonl", "metrics.csv"])
def test_a_resume_neither_reads_nor_writes_through_a_link(name, tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=8, epochs=2)
    (tmp_path / "theirs").write_text("theirs")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "theirs")
    assert call(["resume", str(run)]) == 3
    assert f"{run / name} is a link, and links in a run directory are not followed" in capsys.readouterr().err
    assert (tmp_path / "theirs").read_text() == "theirs"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": {"name": "a"}}, "recipe.path is missing"),
        ({"config": None}, "config is missing"),
        ({"config": [1]}, "config should be an object, but is [1]"),
        ({"device": 3}, "device should be a text, but is 3"),
        ({"watching": {"log_every": "x"}}, "watching: log_every should be a whole number, but is 'x'"),
        ({"compile": [1]}, "compile should be true, false or auto, but is [1]"),
    ],
)
def test_a_resume_of_a_damaged_config_says_what_is_wrong(change, said, tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=8, epochs=2)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    assert call(["resume", str(run)]) == 3
    assert f"cannot be gone on with: config.json: {said}." in capsys.readouterr().err
