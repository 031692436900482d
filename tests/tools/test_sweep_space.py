"""What a sweep tries: texts and values to settings, settings to members, and sweep.json, which strangers may write."""

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steploop.errors import CheckpointDamagedError, ConfigError
from steploop.tools.sweep.search_space import Choices, Span, grouped, read_seeds, read_space
from steploop.tools.sweep.sweep_plan import threads_for
from steploop.tools.sweep.sweep_record import Member, SweepRecord, is_sweep, read_sweep
from steploop.tools.sweep.sweep_writing import write_sweep


@attrs.frozen
class Config:
    rate: float = 0.1
    depth: int = 2
    limit: int | None = None
    kind: Literal["sgd", "adam"] = "sgd"
    name: str = "a"
    widths: tuple[int, ...] = (8,)
    table: dict[str, int] = attrs.field(factory=dict)
    seed: int = 0
    anything: Any = None


def read(**given):
    return read_space(Config, given, where="recipe")


def of_texts(*assignments):
    return read_space(Config, grouped(assignments), where="recipe")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rate=0.1,1"], {"rate": (0.1, 1.0)}),
        (["rate=0.1", "rate=1"], {"rate": (0.1, 1.0)}),
        (["kind=sgd,adam", "depth=3"], {"kind": ("sgd", "adam"), "depth": (3,)}),
        (["widths=8,4", "widths=16"], {"widths": ([8, 4], [16])}),
        (["limit=none,5"], {"limit": (None, 5)}),
        (['name=["a,b", "c"]'], {"name": ("a,b", "c")}),
        (['table={"a": 1}', "table={}"], {"table": ({"a": 1}, {})}),
    ],
)
def test_texts_of_the_command_line_are_alternatives(words, expected):
    assert of_texts(*words) == {name: Choices(values) for name, values in expected.items()}


def test_values_from_python_are_alternatives_or_one_for_all():
    found = read(rate=[0.1, 1], depth=range(2), widths=[(8, 4), [16]], kind="adam", seed=3, name="a,b")
    values = {name: setting.values for name, setting in found.items()}
    assert values == {
        "rate": (0.1, 1.0), "depth": (0, 1), "widths": ([8, 4], [16]), "kind": ("adam",), "seed": (3,), "name": ("a", "b"),
    }  # fmt: skip


def test_a_range_is_of_the_type_of_its_setting():
    assert of_texts("rate=1e-4..1:log", "depth=1..8", "limit=2..3") == {
        "rate": Span(1e-4, 1.0, log=True, whole=False),
        "depth": Span(1, 8, log=False, whole=True),
        "limit": Span(2, 3, log=False, whole=True),
    }
    assert of_texts("name=a..b") == {"name": Choices(("a..b",))}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rte=1"], "recipe has no setting 'rte'. Did you mean rate?"),
        (["rate=0.1,fast"], "recipe: rate must be float, but got 'fast'"),
        (["rate=0.1,0.10"], "rate=0.1 is given twice. Give it once"),
        (["rate=1..0.1"], "rate=1..0.1 is no range. Expected LOW..HIGH with LOW < HIGH"),
        (["rate=0..1:log"], ":log needs LOW > 0"),
        (["rate"], "--set takes name=values, as in --set learning_rate=0.01,0.1, but got 'rate'"),
        (["rate="], "rate must be float, but got ''"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(words, message):
    with pytest.raises(ConfigError) as raised:
        of_texts(*words)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("given_seeds", "expected"),
    [(None, ()), (3, (0, 1, 2)), ("3", (0, 1, 2)), ("3,5", (3, 5)), ([7], (7,)), (range(2), (0, 1))],
)
def test_seeds_are_how_many_or_which(given_seeds, expected):
    assert read_seeds(given_seeds) == expected


@pytest.mark.parametrize("wrong", ["0", "x", "1,1", "-3", 0, [], [1, -1], "99999999999", 1.5])
def test_other_seeds_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"seeds must be how many \(4 means the seeds 0 to 3\)"):
        read_seeds(wrong)


values = st.one_of(
    st.integers(-5, 5), st.booleans(), st.none(), st.text(max_size=3), st.lists(st.integers(0, 3), max_size=2)
)
spaces = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.lists(values, min_size=1, max_size=3).map(lambda v: Choices(tuple(v))),
)


def record(path, space, seeds=(), **fields):
    recipe = {"path": "r.py", "name": "r", "sha256": "ab" * 32, "modules": {}}
    base = dict.fromkeys(["a", "b", "c", "seed"], 0)
    return SweepRecord(path=Path(path), recipe=recipe, base=base, space=space, seeds=tuple(seeds), **fields)


@given(space=spaces, seeds=st.lists(st.integers(0, 9), unique=True, max_size=3))
def test_a_grid_is_every_combination_once_in_a_fixed_order(space, seeds, tmp_path_factory):
    """By nested loops; and what sweep.json gives back is the same grid."""
    expected = [()]
    for setting in space.values():
        expected = [(*row, value) for row in expected for value in setting.values]
    if seeds:
        expected = [(*row, seed) for row in expected for seed in seeds]
    path = tmp_path_factory.mktemp("sweep")
    sweep = record(path, space, seeds)
    names = [*space, *(["seed"] if seeds else [])]
    assert sweep.members() == tuple(
        Member(n, dict(zip(names, row, strict=True)))
        for n, row in zip(itertools.count(), expected, strict=False)
    )
    assert sweep.size == len(expected)
    write_sweep(sweep)
    assert read_sweep(path) == sweep


def test_a_range_survives_being_written(tmp_path):
    space = {"a": Span(1e-4, 1.0, log=True, whole=False), "b": Choices((1, 2))}
    sweep = record(tmp_path, space, search="optuna", trials=5, metric=("loss", "min"))
    write_sweep(sweep)
    assert is_sweep(tmp_path)
    assert read_sweep(tmp_path) == sweep


@pytest.mark.parametrize(
    "change",
    [
        {"space": {"a": []}}, {"space": {"z": [1]}}, {"space": [1]}, {"seeds": [-1]}, {"seeds": 4}, {"search": "other"},
        {"trials": -1}, {"threads": 0}, {"recipe": {"path": 3}}, {"metric": ["loss", "up"]}, {"space": {"a": {"low": 1}}},
        {"space": {"a": {"low": 0, "high": 1, "log": False, "whole": False}}}, {"format": 2}, {"options": []},
        {"space": {n: list(range(1000)) for n in "abc"}}, {"recipe": {"path": "r", "name": "r", "sha256": "x", "modules": {}}},
    ],
)  # fmt: skip
def test_a_record_that_no_sweep_writes_is_refused(change, tmp_path):
    write_sweep(record(tmp_path, {"a": Choices((1, 2))}))
    said = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**said, **change}))
    with pytest.raises(CheckpointDamagedError, match=r"sweep\.json"):
        read_sweep(tmp_path)


def test_a_link_in_the_place_of_the_record_is_not_followed(tmp_path):
    write_sweep(record(tmp_path, {}))
    (tmp_path / "sweep.json").rename(tmp_path / "other.json")
    (tmp_path / "sweep.json").symlink_to(tmp_path / "other.json")
    assert not is_sweep(tmp_path)
    with pytest.raises(CheckpointDamagedError, match="links in a run directory are not followed"):
        read_sweep(tmp_path)


def test_jobs_share_the_cores_unless_the_environment_says_how_many_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert [threads_for(jobs) for jobs in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_for(2) == 3
    with pytest.raises(ConfigError, match="jobs must be a whole number from 1 on, but is 0"):
        threads_for(0)
