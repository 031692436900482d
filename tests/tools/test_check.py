"""``steploop check`` finds every kind of fault, in a recipe that is broken in just that way, and passes the sound one."""

import json
from pathlib import Path

import attrs
import pytest
import torch

from steploop.errors import ConfigError
from steploop.tools.check.batch_structure import first_samples
from steploop.tools.check.law_cases import LAWS, NotApplicable
from steploop.tools.check.subjects import Subject, loaders_of, smaller
from steploop.tools.check.verdicts import examine
from steploop.tools.cli import call

FOLDER = Path(__file__).parents[1] / "helpers" / "broken_recipes"

PURE = "the step is a pure function of (state, batch)"
SURROUNDINGS = "no surrounding of the call matters"
CUT = "a run can be cut anywhere"
RESUME = "a resume in a new process is exact"
REACHED = "every parameter gets a gradient"
LEARNED = "one batch can be learned by heart"
EVALUATION = "an evaluation changes nothing"
BATCH_SIZE = "an evaluation does not depend on the batch size"
ORDER = "the batches are a function of (epoch, position)"
WORKERS = "the batches do not depend on the workers"
DETERMINISTIC = "every operation is deterministic"

# recipe, a law that it breaks, the smallest case that shows it, and what the message has to say
FAULTS = [
    ("counter_in_objective", PURE, "1 batch of 8 samples", "a global, a closure"),
    (
        "counter_in_objective",
        CUT,
        "1 batch of 8 samples, cut after 0",
        "must equal the uninterrupted run: params.first",
    ),
    ("memory_in_model", PURE, "1 batch of 8 samples", "an attribute of the model"),
    (
        "batch_in_place",
        PURE,
        "1 batch of 8 samples",
        "a step must not change its batch: 0: 40 of 40 elements differ",
    ),
    ("numpy_noise", PURE, "1 batch of 8 samples", "the same state and batch must give the same result"),
    ("numpy_noise", SURROUNDINGS, "2 batches of 8 samples, other random numbers", "params.first.weight"),
    (
        "noise_in_step",
        SURROUNDINGS,
        "2 batches of 8 samples, other random numbers",
        "torch's generator has moved",
    ),
    ("default_dtype", SURROUNDINGS, "2 batches of 8 samples, float64 as the default dtype", "params.first"),
    (
        "order_of_a_set",
        RESUME,
        "3 batches of 8 samples, saved after 1",
        "resumed after 1 batches must equal the uninterrupted run",
    ),
    ("average_in_closure", RESUME, "3 batches of 8 samples, saved after 1", "params.first"),
    ("detached_layer", REACHED, "3 batches of 8 samples", "none reached first.bias, first.weight in 3 steps"),
    ("softmax_twice", LEARNED, "1 batch of 8 samples, Adam", "a softmax before cross entropy"),
    ("uphill", LEARNED, "1 batch of 8 samples, train_step", "Look at the sign of the loss"),
    (
        "evaluation_in_train_mode",
        EVALUATION,
        "1 batch of 8 samples",
        "must not change the state: buffers.norm.running",
    ),
    (
        "mean_of_batch_means",
        BATCH_SIZE,
        "7 samples in batches of 4",
        "must not depend on the batch size (7 or 4): loss is",
    ),
    ("sum_over_samples", BATCH_SIZE, "7 samples in batches of 4", "loss is"),
    (
        "batch_size_of_config",
        BATCH_SIZE,
        "another batch_size",
        "must not depend on batch_size=4: accuracy is",
    ),
    (
        "generator_in_dataset",
        WORKERS,
        "epoch 0, 1 worker",
        "epoch 0 with 1 workers must equal those with 0: 0.0: 40 of 40",
    ),
    (
        "seed_of_the_worker",
        WORKERS,
        "epoch 0, 2 workers",
        "epoch 0 with 2 workers must equal those with 0: 1.0",
    ),
    (
        "shuffles_anew",
        ORDER,
        "epoch 0 from batch 0 on",
        "epoch 0 from batch 0 on must be the rest of the epoch: 0.0",
    ),
    (
        "nondeterministic_put",
        DETERMINISTIC,
        "1 batch of 8 samples",
        "but torch reports put_. Use another operation",
    ),
]


def subject_of(name, **options):
    return Subject(path=FOLDER / f"{name}.py", values={}, device=torch.device("cpu"), **options)


@pytest.mark.parametrize(
    ("name", "law", "example", "message"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS]
)
def test_a_broken_recipe_is_caught_with_the_smallest_example(name, law, example, message):
    (verdict,) = examine(subject_of(name), laws=[one for one in LAWS if one.name == law])
    assert verdict.passed is False
    assert verdict.example == example
    assert message in verdict.message


def test_every_broken_recipe_is_in_the_table():
    broken = {path.stem for path in FOLDER.glob("*.py") if "import sound" in path.read_text()}
    assert broken == {fault[0] for fault in FAULTS}


def test_the_sound_recipe_passes_every_law_from_the_command_line(capsys):
    assert call(["check", str(FOLDER / "sound.py"), "--device", "cpu", "--json"]) == 0
    (verdicts,) = json.loads(capsys.readouterr().out).values()
    assert [v["law"] for v in verdicts] == [law.name for law in LAWS]
    assert all(v["passed"] and v["cases"] for v in verdicts)


def test_a_broken_recipe_ends_with_exit_code_1_and_a_line_for_each_law(capsys, monkeypatch):
    wanted = {BATCH_SIZE, DETERMINISTIC}
    monkeypatch.setattr("steploop.tools.check.verdicts.LAWS", [law for law in LAWS if law.name in wanted])
    assert call(["check", str(FOLDER / "mean_of_batch_means.py"), "--device", "cpu", "--samples", "5"]) == 1
    table = capsys.readouterr().out
    for text in (
        "mean_of_batch_means",
        "FAILED",
        "passed",
        "5 samples in batches of 3: the evaluation",
        "Smallest failing example: ",
        "mean_of_batch_means: 1 FAILED, 1 passed",
    ):
        assert text in table


def test_a_recipe_that_raises_fails_the_law_with_the_error(monkeypatch):
    def broken(_):
        raise ZeroDivisionError("division by zero")
        yield

    from steploop.tools.check.law_cases import Law

    (verdict,) = examine(subject_of("sound"), laws=[Law("some law", broken)])
    assert (verdict.passed, verdict.cases) == (False, 0)
    assert verdict.message == "ZeroDivisionError: division by zero"
    assert verdict.example == "before the first case"


def test_a_law_that_does_not_apply_says_why():
    class Bare(Subject):
        def fresh(self, **changes):
            return attrs.evolve(Subject.fresh(self, **changes), evaluate=None, objective=None)

    bare = Bare(path=FOLDER / "sound.py", values={}, device=torch.device("cpu"))
    wanted = [law for law in LAWS if law.name in {LEARNED, EVALUATION, BATCH_SIZE}]
    verdicts = list(examine(bare, laws=wanted))
    assert [v.passed for v in verdicts] == [None, None, None]
    assert [v.message for v in verdicts] == ["the Recipe names no objective"] + 2 * [
        "the Recipe has no evaluate"
    ]


def test_an_unknown_recipe_is_refused_as_by_every_command(capsys):
    assert call(["check", "cifar_apm"]) == 2
    assert "cifar_amp" in capsys.readouterr().err


def test_a_phase_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="has no phase 1"):
        subject_of("sound", phase=1).fresh()


def test_first_samples_cuts_the_first_axis_of_every_tensor_that_has_one():
    batch = {"x": torch.zeros(6, 2), "y": torch.zeros(6), "scale": torch.zeros(())}
    cut = first_samples(batch, 4)
    assert {name: tuple(t.shape) for name, t in cut.items()} == {"x": (4, 2), "y": (4,), "scale": ()}


def test_a_smaller_loader_has_fewer_samples_and_the_batch_size_asked_for():
    recipe = subject_of("sound").recipe
    (cell,) = loaders_of(recipe.evaluate)
    loader = smaller(cell.cell_contents, 7, batch_size=3)
    assert [len(labels) for _, labels in loader.epoch(0)] == [3, 3, 1]
    from steploop.data import Loader

    tensors = smaller(Loader(torch.arange(20), batch_size=9, seed=0, shuffle=False), 5)
    assert [batch.tolist() for batch in tensors.epoch(0)] == [[0, 1, 2, 3, 4]]


def test_not_applicable_is_no_failure():
    assert not issubclass(NotApplicable, AssertionError)
