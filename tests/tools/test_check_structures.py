"""``steploop check`` judges the recipe, not its own guesses about the batch: sound recipes with odd batches never fail."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steploop.recipe.config_values import configure
from steploop.recipe.recipe_files import load_recipe_file
from steploop.tools.bench.jobs import Job
from steploop.tools.check.law_cases import LAWS, Law
from steploop.tools.check.one_line import one_line
from steploop.tools.check.resume_process import main
from steploop.tools.check.subjects import Subject
from steploop.tools.check.verdicts import examine
from steploop.tools.cli import call
from steploop.tools.lr_finder import RangeTest, range_test

FILE = Path(__file__).parents[1] / "helpers" / "odd_recipes" / "odd_batches.py"
RESUME = "a resume in a new process is exact"
BATCH_SIZE = "an evaluation does not depend on the batch size"
WORKERS = "the batches do not depend on the workers"
ORDER = "the batches are a function of (epoch, position)"
LEARNED = "one batch can be learned by heart"


def subject_of(kind, **options):
    return Subject(path=FILE, values={"kind": kind}, device=torch.device("cpu"), **options)


def verdicts_of(subject, *without):
    found = list(examine(subject, laws=[law for law in LAWS if law.name not in without]))
    assert [v for v in found if v.passed is False] == []
    return {v.law: v for v in found}


# kind -> why its batches are not cut (None: they are), and the size of the first tensor after it
WHOLE = {
    "dense": (None, 8),
    "sparse": ("the batch holds a sparse tensor", 12),
    "edges": ("the first axes of the batch's tensors differ: [2, 12]", 12),
    "adjacency": ("train_step takes no batch of 8 samples (RuntimeError: mat", 12),
    "micro-batches": ("the first axes of the batch's tensors differ: [4, 10, 11]", 11),
    "rows": ("train_step takes no batch of 8 samples (RuntimeError: The size of tensor", 12),
    "object": ("the batch holds a value of type Graph", None),
    "time first": (None, 8),
    "samples_of": (None, 8),
    "carry": (None, 8),
    "policy": ("the batch holds no tensor with an axis for samples", None),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_batch_is_cut_only_where_the_step_takes_the_part(kind):
    reason, length = WHOLE[kind]
    subject = subject_of(kind)
    assert (subject.structure.cut is None) == (reason is not None)
    if reason is not None:
        assert subject.structure.why.startswith(reason)
        assert "Recipe(samples_of=...) can say" in subject.structure.why
    batch = subject.batches[0]
    if length is not None:
        first = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
        assert len(first[0] if isinstance(first, tuple) else first) == length


@pytest.mark.parametrize("kind", WHOLE)
def test_no_law_fails_for_a_sound_recipe_of_any_structure(kind):
    found = verdicts_of(subject_of(kind), RESUME)
    assert found[WORKERS].passed is None
    if kind not in {"dense", "rows"}:
        assert found[BATCH_SIZE].passed is None
    assert (found[ORDER].passed is None) == (kind == "object")
    assert found["the step is a pure function of (state, batch)"].passed


def test_a_law_that_rests_on_a_guess_says_what_was_supposed():
    (verdict,) = examine(subject_of("time first"), laws=[law for law in LAWS if law.name == BATCH_SIZE])
    assert verdict.message.startswith(
        "it is only supposed that the first axis (12) counts samples. Recipe(samples_of="
    )
    assert "must not depend on the partition [4, 4]: loss is " in verdict.message


def test_an_objective_that_takes_another_batch_than_the_step_is_not_judged():
    (verdict,) = examine(subject_of("micro-batches"), laws=[law for law in LAWS if law.name == LEARNED])
    assert verdict.passed is None
    assert verdict.message.startswith("the objective by itself, on this batch and with Adam, ends with ")


@pytest.fixture
def resumed_here(monkeypatch):
    """The other process of a resume is this one: to start one takes seconds."""

    def run(command, **_):
        main(command[-1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("steploop.tools.check.resume_process.subprocess.run", run)


@pytest.mark.usefixtures("resumed_here")
def test_plateau_and_early_stopping_have_begun_as_in_a_run():
    """All laws, the resume too."""
    assert subject_of("plateau").recipe.state.plateau.learning_rate == 0.1
    found = verdicts_of(subject_of("plateau", steps=2))
    assert found[RESUME].passed


@pytest.mark.usefixtures("resumed_here")
@pytest.mark.parametrize("kind", ["adjacency", "samples_of", "carry", "rows"])
def test_a_resumed_process_cuts_its_batches_in_the_same_way(kind):
    (verdict,) = examine(subject_of(kind, steps=2), laws=[law for law in LAWS if law.name == RESUME])
    assert verdict.passed, verdict


# --- how it is said -------------------------------------------------------------------------------------------------


def test_an_error_of_many_lines_is_cut_to_one_that_names_the_line_of_the_recipe():
    def cases(_):
        def fail():
            exec(compile("\n\nraise ValueError('first\\nsecond\\n' * 900)", str(FILE), "exec"), {})

        yield "1 batch", fail

    (verdict,) = examine(subject_of("dense"), laws=[Law("some law", cases)])
    assert verdict.message == "ValueError: first (odd_batches.py:3)"


def test_an_assert_of_the_recipe_says_where_it_stands():
    def cases(_):
        def fail():
            exec(compile("\nassert 1 == 2", str(FILE), "exec"), {})

        yield "1 batch", fail

    (verdict,) = examine(subject_of("dense"), laws=[Law("some law", cases)])
    assert (verdict.passed, verdict.message) == (False, "AssertionError (odd_batches.py:2)")


@pytest.mark.parametrize(
    ("broken", "example"),
    [("model = (PerRow", "build"), ("yield self.make(", "the first batches")],
    ids=["build", "batches"],
)
def test_a_recipe_that_raises_before_any_law_gets_one_line(broken, example, tmp_path, capsys):
    text = FILE.read_text()
    assert broken in text
    path = tmp_path / "broken.py"
    path.write_text(
        text.replace(broken, f"assert {'0' if example == 'build' else 'epoch'}, 'first\\nsecond'; {broken}")
    )
    assert call(["check", str(path), "--device", "cpu", "--set", "kind=sparse"]) == 1
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "FAILED          the recipe can be built and gives batches. Smallest failing example: "
    )
    assert f"{example}: AssertionError: first (broken.py:" in line
    assert total == "broken: 1 FAILED"


def test_one_line_is_never_long():
    assert one_line(ValueError("x" * 5000)) == f"ValueError: {'x' * 388}..."
    assert one_line(KeyError()) == "KeyError"


def test_each_law_is_printed_as_it_finishes(capsys, monkeypatch):
    seen = []

    def cases(name):
        def make(_):
            seen.append((name, capsys.readouterr().out))
            yield "1 batch", lambda: None

        return make

    laws = [Law(name, cases(name)) for name in ("first", "second")]
    monkeypatch.setattr("steploop.tools.check.verdicts.LAWS", laws)
    assert call(["check", str(FILE), "--device", "cpu"]) == 0
    assert seen == [("first", ""), ("second", "passed          first (1 case)\n")]
    assert capsys.readouterr().out == "passed          second (1 case)\nodd_batches: 2 passed\n"


def test_quick_tries_the_first_and_the_last_case_and_begins_no_law_too_late(capsys, monkeypatch):
    tried = []

    def cases(_):
        for number in range(5):
            yield f"case {number}", lambda number=number: tried.append(number)

    laws = [Law("c", cases, late=True), Law("a", cases), Law("slow", cases, quick=False), Law("b", cases)]
    clock = itertools.chain([0.0, 0.0, 12.0, 6.5])
    found = list(examine(subject_of("dense"), laws=laws, seconds=12.0, clock=lambda: next(clock)))
    assert tried == [0, 4, 0, 4]
    assert [v.law for v in found] == ["a", "slow", "b", "c"]
    assert [(v.passed, v.tried, v.cases) for v in found] == [
        (True, True, 2),
        (None, False, 0),
        (True, True, 2),
        (None, False, 0),
    ]
    assert [v.message for v in found if not v.tried] == [
        "it takes too long for --quick",
        "--quick has no time left",
    ]
    monkeypatch.setattr("steploop.tools.check.verdicts.LAWS", laws[1:3])
    assert call(["check", str(FILE), "--device", "cpu", "--quick"]) == 0
    assert (
        "not tried       slow: it takes too long for --quick\nodd_batches: 1 passed, 1 not tried"
        in capsys.readouterr().out
    )


# --- the tools that look at a recipe without running it start from the state of a run --------------------------------


def test_a_range_test_varies_the_rate_of_a_plateau_and_bench_has_it_begun():
    """The train step sets the plateau's rate itself, before it uses it."""
    recipe = load_recipe_file(FILE).build(
        configure(load_recipe_file(FILE).config_class, {"kind": "plateau"}), "cpu"
    )
    assert recipe.state.plateau is None
    found = range_test(recipe, RangeTest(low=1e-4, high=1.0, steps=20))
    assert len(found.rates) == 20
    assert recipe.state.plateau is None
    built, _ = Job(recipe=FILE, overrides=("kind=plateau",), device="cpu").build()
    assert built.state.plateau.learning_rate == 0.1
    assert built.state.early_stopping.bad_checks == 0
