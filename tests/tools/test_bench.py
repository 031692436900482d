"""``steploop bench``: fair turns, the hand-written loop does the same work, one sentence that follows from the numbers."""

import inspect
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import ClassVar

import attrs
import pytest
import torch
from compiled_runs import needs_compiler

from steploop import Ranks
from steploop.data import Loader, Stream
from steploop.errors import ConfigError
from steploop.tools.bench import handwritten, worker
from steploop.tools.bench import rounds as measuring
from steploop.tools.bench.by_ranks import ddp_step, on_ranks
from steploop.tools.bench.data_advice import faster_batches
from steploop.tools.bench.jobs import (
    CASES,
    COMPILED,
    COMPILED_MODEL,
    COMPILING,
    CONTENDERS,
    DDP,
    EAGER,
    EXACT,
    FAST,
    HANDWRITTEN,
    RANK_CONTENDERS,
    Job,
)
from steploop.tools.bench.rank_workers import RankWorkers
from steploop.tools.bench.rounds import Measured, Results, advice, measure
from steploop.tools.cli import call

RECIPE = '''
"""A classifier of random points, as plain as a recipe can be."""

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from steploop import (
    Optimizer, TrainState, backward_scaled, constant, forward_loss, optimizer_step, schedule, unscale_and_clip,
)
from steploop.data import Loader
from steploop.recipe import Recipe


@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 1
    seed: int = 0
    precision: str = "fp32"
    average: bool = False
    several: bool = False


def build(config, device):
    torch.manual_seed(config.seed)
    inputs = torch.randn(40, 6)
    data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())

    def objective(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def one_step(state, batch):
        state = backward_scaled(forward_loss(state, batch, objective))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0))
        return schedule(state, constant(0.1))

    def several_steps(states, batch):
        return {name: one_step(state, batch) for name, state in states.items()}

    def first():
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = Optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
        return TrainState.create(model, optimizer, precision=config.precision, ema=config.average)

    print("recipes may print")
    return Recipe(
        state={"a": first(), "b": first()} if config.several else first(),
        train_step=several_steps if config.several else one_step,
        batches=Loader(data, batch_size=8, seed=config.seed, device=device),
        epochs=config.epochs,
        objective=None if config.several else objective,
    )
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "points.py"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def job(path, *overrides):
    return Job(recipe=path, overrides=overrides, device="cpu", batches=4, tune=False)


# -- the contenders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_handwritten_loop_does_the_work_of_the_recipes_step(recipe, precision):
    by_hand, ours = (
        worker.Contender(job(recipe, f"precision={precision}"), name) for name in (HANDWRITTEN, EAGER)
    )
    left = [by_hand._step(batch).item() for batch in by_hand.batches * 5]
    right = [ours._step(batch).item() for batch in ours.batches * 5]
    assert left == pytest.approx(right, rel=1e-3)
    assert left[-1] < 0.9 * left[0]


@pytest.mark.parametrize("settings", [["overhead"], ["smallcnn"], ["smallcnn", "channels_last=true"]])
def test_the_yardsticks_train_to_the_bits_of_the_handwritten_loop(settings):
    name, *overrides = settings
    by_hand, ours = (
        worker.Contender(job(CASES[name], "batch_size=4", *overrides), form) for form in (HANDWRITTEN, EAGER)
    )
    left = [by_hand._step(batch).item() for batch in by_hand.batches * 2]
    right = [ours._step(batch).item() for batch in ours.batches * 2]
    assert left == right
    layout = torch.channels_last if overrides else torch.contiguous_format
    assert ours.batches[0][0].dim() == 2 or ours.batches[0][0].is_contiguous(memory_format=layout)


def test_the_handwritten_loop_averages_where_the_state_does(recipe):
    built, _ = job(recipe, "average=true").build()
    step = handwritten.handwritten_step(built.state, built.objective)
    averages = [c.cell_contents.average for c in step.__closure__ if hasattr(c.cell_contents, "average")]
    before = {k: v.clone() for k, v in averages[0].module.named_parameters()}
    for batch in built.batches.epoch(0):
        step(batch)
    assert all(not torch.equal(v, before[k]) for k, v in averages[0].module.named_parameters())


def test_a_recipe_of_several_states_has_no_handwritten_loop(recipe):
    with pytest.raises(ConfigError, match=r"loop needs a single state and Recipe\.objective"):
        worker.Contender(job(recipe, "several=true"), HANDWRITTEN)
    ours = worker.Contender(job(recipe, "several=true"), EAGER)
    assert ours.steps(3) > 0


def test_a_contender_counts_samples_memory_and_waiting(recipe):
    ours = worker.Contender(job(recipe), EAGER)
    assert ours.samples() == 8.0
    assert 0.0 < ours.waiting(20) < 1.0
    peak = ours.peak_mib(2)
    assert (peak is None) or peak > 10.0


@needs_compiler
def test_the_compiled_contenders_train(recipe):
    for name in (COMPILED, COMPILED_MODEL):
        contender = worker.Contender(job(recipe), name)
        losses = [contender._step(batch).item() for batch in contender.batches * 5]
        assert losses[-1] < 0.9 * losses[0]


def test_a_worker_answers_in_json_and_survives_mistakes(recipe):
    requests = [
        {"job": job(recipe).to_json(), "name": "no such form"},
        {"job": job(recipe).to_json(), "name": EAGER},
        {"call": "steps", "count": 2},
        {"call": "no such method", "count": 2},
    ]
    answers = io.StringIO()
    worker._serve(io.StringIO("".join(json.dumps(r) + "\n" for r in requests)), answers)
    wrong, built, steps, unknown = map(json.loads, answers.getvalue().splitlines())
    assert wrong["error"] == "SteploopError: bench: there is no contender 'no such form'."
    assert built == {"samples": 8.0}
    assert steps["value"] > 0
    assert "no such method" in unknown["error"]


# -- turns ------------------------------------------------------------------------------------------------------


class Fake:
    """A contender whose steps take a set time, growing from round to round as on a busy machine."""

    order: ClassVar[list[str]] = []
    begun: ClassVar[list[str]] = []
    open: ClassVar[list["Fake"]] = []
    seconds: ClassVar[dict[str, float]] = {
        HANDWRITTEN: 0.010,
        EAGER: 0.008,
        COMPILED: 0.002,
        COMPILED_MODEL: 0.020,
        DDP: 0.010,
        EXACT: 0.015,
        FAST: 0.010,
    }

    def __init__(self, job, name):
        if name == "broken":
            raise measuring.ContenderFailed("ImportError: no module named broken")
        self.name, self.samples, self.turns = name, 8.0, 0
        self.compiles = name not in Fake.begun
        Fake.begun.append(name)
        Fake.open.append(self)

    def call(self, method, count):
        if method == "steps":
            Fake.order.append(self.name)
            self.turns += 1
            busy = 1.0 + 0.5 * (self.turns % 2)
            compiling = 5.0 if self.turns == 1 and self.compiles and self.name in COMPILING else 0.0
            return compiling + count * self.seconds[self.name] * busy
        return {"peak_mib": 100.0, "waiting": 0.02}[method]

    def close(self):
        Fake.open.remove(self)


@pytest.fixture(autouse=True)
def no_process_is_left():
    Fake.order, Fake.begun, Fake.open = [], [], []
    yield
    assert not Fake.open


def test_contenders_take_turns_and_ratios_are_of_the_same_round(recipe):
    said = []
    results = measure(job(recipe), [*CONTENDERS, "broken"], rounds=4, report=said.append, workers=Fake)
    warm = 2 * len(CONTENDERS)
    assert Fake.order[warm : -len(COMPILING)] == list(CONTENDERS) * 4
    rows = {row.name: row for row in results.rows}
    assert rows[COMPILED].ratio == pytest.approx(0.2)
    assert max(rows[COMPILED].ratios) - min(rows[COMPILED].ratios) < 1e-9  # both were slow in the same round
    assert rows[EAGER].best_us == pytest.approx(8000.0)
    assert rows[EAGER].samples_per_s == pytest.approx(1000.0)
    assert rows["broken"].error == "ImportError: no module named broken"
    assert (results.base, results.waiting) == (HANDWRITTEN, 0.02)
    assert said[-1] == "waiting for data"


def test_what_compiles_is_timed_once_more_in_a_second_process(recipe):
    """The first three steps, when all turns are taken: a process that compiles meanwhile would disturb them."""
    results = measure(job(recipe), CONTENDERS, rounds=2, report=lambda _: None, workers=Fake)
    assert Fake.begun == [*CONTENDERS, *COMPILING]
    assert Fake.order[-len(COMPILING) :] == list(COMPILING)
    rows = {row.name: row for row in results.rows}
    assert rows[COMPILED].first_s == pytest.approx(5.0 + 3 * 0.002 * 1.5)
    assert rows[COMPILED].again_s == pytest.approx(3 * 0.002 * 1.5)
    assert [row.name for row in results.rows if row.again_s is not None] == list(COMPILING)


def test_a_second_process_that_fails_leaves_the_numbers_of_the_first(recipe):
    def once(job, name):
        if name in Fake.begun:
            raise measuring.ContenderFailed("the process died")
        return Fake(job, name)

    results = measure(job(recipe), CONTENDERS, rounds=1, report=lambda _: None, workers=once)
    assert all(row.error is None and row.again_s is None for row in results.rows)


def test_without_a_handwritten_loop_the_first_form_is_the_base(recipe):
    results = measure(job(recipe), ["broken", EAGER, COMPILED], rounds=1, report=lambda _: None, workers=Fake)
    assert results.base == EAGER


def row(name, us, first_s=1.0):
    return Measured(name=name, us=(us,), ratios=(1.0,), samples_per_s=1.0, first_s=first_s)


@pytest.mark.parametrize(
    ("rows", "waiting", "sentence"),
    [
        ([row(EAGER, 100.0), row(COMPILED, 50.0, 10.0)], 0.01, "Use --compile: it is 2.00 times as fast as eager, and its 10 s of compiling are won back after 200,000 steps."),
        ([row(EAGER, 100.0), row(COMPILED, 99.0)], 0.01, "Use the eager form: compiling does not pay here (1.01 times its speed)."),
        ([row(EAGER, 100.0), row(COMPILED, 50.0)], 0.4, "Look at the data first: 40% of a step waits for a batch, which no form of the step changes. Do this."),
        ([row(EAGER, 100.0), Measured(name=COMPILED, error="CompileError: no")], None, "Use the eager form: the other could not be measured"),
        ([Measured(name=EAGER, error="x"), Measured(name=COMPILED, error="y")], None, "steploop could not be measured"),
    ],
)  # fmt: skip
def test_the_advice_follows_from_the_numbers(rows, waiting, sentence):
    found = Results(rows=tuple(rows), base=HANDWRITTEN, waiting=waiting)
    assert advice(found, "Do this.").startswith(sentence)


TENSORS = (torch.zeros(8, 2), torch.zeros(8))


@pytest.mark.parametrize(
    ("batches", "settings", "sentence"),
    [
        (Loader(TENSORS, batch_size=2, seed=0), ["num_workers"], "The data are in memory already, where workers do not help"),
        (Loader(TENSORS, batch_size=2, seed=0, augment=lambda b, _: b), [], "The data are in memory already: the time goes into augment."),
        (Loader([1, 2, 3], batch_size=2, seed=0), [], "Prepare the batches in workers (Loader(num_workers=N)), or keep"),
        (Loader([1, 2, 3], batch_size=2, seed=0, num_workers=2), ["num_workers"], "Prepare the batches in more workers than 2 (--set num_workers=N), or"),
        (Stream(lambda epoch, start: [1], length=1), [], "Make its batches in other processes, or keep them in memory"),
    ],
)  # fmt: skip
def test_what_makes_batches_decides_what_makes_them_faster(batches, settings, sentence):
    found = faster_batches(batches, settings)
    assert found.startswith(sentence)
    for argument in re.findall(r"\b(\w+)=N", found):
        assert argument in inspect.signature(Loader).parameters


# -- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_workers(monkeypatch):
    real = measuring.measure

    def with_fakes(*args, **kwargs):
        return real(*args, **{**kwargs, "workers": Fake})

    monkeypatch.setattr(measuring, "measure", with_fakes)
    monkeypatch.setattr(handwritten, "installed_peers", list)


def test_the_table_has_a_row_for_every_form(recipe, capsys, fake_workers):
    assert call(["bench", str(recipe), "--device", "cpu", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "points on cpu" in out
    table = out.partition("\n\n")[2].splitlines()
    assert max(map(len, table[: len(CONTENDERS) + 1])) <= 80
    for name in CONTENDERS:
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
    assert "Waiting for data: 2% of a step." in out
    again = "The first three in a second process, which finds what was compiled: torch.compile(model) 0.1 s, steploop compiled 0.0 s."
    assert again in out.splitlines()
    assert out.splitlines()[-1].startswith("Use --compile: it is 4.00 times as fast as eager")


@pytest.mark.parametrize("given", [None, "somewhere"])
def test_all_processes_share_a_cache_that_was_empty_and_is_gone(recipe, capsys, monkeypatch, given):
    """Else nothing says what compiling takes: an earlier measurement has compiled the same."""
    if given:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        monkeypatch.setenv("TRITON_CACHE_DIR", given)
    seen = []

    class Told(Fake):
        def __init__(self, job, name, *, environment):
            super().__init__(job, name)
            folder = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
            seen.append(
                (folder, name in {p.name for p in folder.iterdir()}, "TRITON_CACHE_DIR" in environment)
            )
            (folder / name).touch()

    monkeypatch.setattr(measuring, "Worker", Told)
    monkeypatch.setattr(handwritten, "installed_peers", list)
    assert call(["bench", str(recipe), "--device", "cpu", "--rounds", "1"]) == 0
    folders, found, triton = zip(*seen, strict=True)
    assert len(set(folders)) == 1
    assert folders[0] != Path("somewhere")
    assert not folders[0].exists()
    assert found == (False,) * len(CONTENDERS) + (True,) * len(COMPILING)
    assert not any(triton)


def test_json_holds_every_number(recipe, capsys, fake_workers):
    assert call(["bench", str(recipe), "--device", "cpu", "--rounds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(found["recipe"]) == recipe
    assert [r["name"] for r in found["rows"]] == list(CONTENDERS)
    assert all(len(r["us"]) == 3 and math.isclose(min(r["us"]), r["best_us"]) for r in found["rows"])
    assert found["waiting"] == 0.02
    assert "torch" in found["conditions"]


def test_the_yardsticks_are_known_by_name(capsys, fake_workers):
    assert call(["bench", "overhead", "--device", "cpu", "--rounds", "1"]) == 0
    assert "overhead on cpu" in capsys.readouterr().out


def test_a_mistake_in_the_settings_is_said_once(recipe, capsys):
    assert call(["bench", str(recipe), "--set", "precison=bf16"]) == 2
    err = capsys.readouterr().err
    assert "precision" in err
    assert err.count("steploop:") == 1


def test_a_worker_process_measures_for_real(recipe):
    real = measuring.Worker(job(recipe), EAGER)
    try:
        assert real.samples == 8.0
        assert real.call("steps", 3) > 0
    finally:
        real.close()
    assert real._process.returncode is not None


def by_hand(recipe, step, count=5):
    """The loss of the last of so many steps."""
    batches = [*itertools.islice(recipe.batches.epoch(0), 4)]
    return [step(batch).item() for batch in (batches * 2)[:count]][-1]


def test_processes_on_two_ranks_take_the_steps_of_one_and_answer_as_one(recipe):
    ranks = RankWorkers(attrs.evolve(job(recipe), nproc=2), EXACT)
    try:
        assert ranks.samples == 8.0
        loss = ranks.call("loss", 5)
        assert ranks.call("steps", 2) > 0
    finally:
        ranks.close()
    built, _ = job(recipe).build()
    alone = handwritten.handwritten_step(built.state, built.objective)
    assert loss == pytest.approx(by_hand(built, alone), rel=1e-4)


def test_the_step_with_distributed_data_parallel_is_the_handwritten_one(recipe):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        built, again = (job(recipe).build()[0] for _ in range(2))
        loss = by_hand(built, ddp_step(built.state, built.objective))
    finally:
        torch.distributed.destroy_process_group()
    assert loss == by_hand(again, handwritten.handwritten_step(again.state, again.objective))


def test_the_parts_of_all_ranks_are_the_batches(recipe):
    built, _ = job(recipe).build()
    batches = [*built.batches.epoch(0)]
    ranks = [Ranks(rank=rank, size=2, parts=2) for rank in range(2)]
    cut = [on_ranks(built, batches, one, whole_parts=False)[1] for one in ranks]
    for batch, *parts in zip(batches, *cut, strict=True):
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), batch[0])


def test_the_table_on_ranks_compares_with_distributed_data_parallel(recipe, capsys, fake_workers):
    assert call(["bench", str(recipe), "--device", "cpu", "--rounds", "2", "--nproc", "2"]) == 0
    out = capsys.readouterr().out
    assert "points on cpu, 2 ranks, each with " in out
    rows = [name for line in out.splitlines() for name in RANK_CONTENDERS if line.startswith(f"{name}  ")]
    assert rows == list(RANK_CONTENDERS)
    assert "Waiting for data" not in out
    last = "Exact sums take 1.50 of the time of DistributedDataParallel, fast ones 1.00; single rounds differ by 0.00. Use --ranks fast"
    assert out.splitlines()[-1].startswith(last)


def test_a_worker_process_that_fails_says_why(recipe):
    with pytest.raises(measuring.ContenderFailed, match="loop needs a single state"):
        measuring.Worker(job(recipe, "several=true"), HANDWRITTEN)
