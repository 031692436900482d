"""What a resume is given anew is applied and recorded, or refused by name; a refused resume changes nothing."""

import json
import os
import shutil
import signal
from pathlib import Path

import attrs
import pytest
import torch
from running import lines, train

from steploop import cosine_annealing
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError, ConfigError, DataError
from steploop.runs.conduct import carry_out
from steploop.runs.contract import Change, sentence
from steploop.runs.logs.screens import QuietScreen
from steploop.runs.requests import resume_request
from steploop.runs.signals import StopFlag
from steploop.tools.cli import call

RECIPE = """
import attrs, torch, torch.nn.functional as F
from torch import nn
from steploop import *
from steploop.data import Loader, Stream
from steploop.recipe import Recipe

@attrs.frozen(kw_only=True)
class Config:
    epochs: int = 3
    seed: int = 0
    rate: float = 0.1
    momentum: float = 0.0
    beta: float = 0.9
    decay: float = 0.0
    batch_size: int = 4
    samples: int = 24
    data_seed: int = 1
    note: str = "made"
    gain: float = 1.0
    kind: str = "sgd"
    scheduled: bool = False
    amsgrad: bool = False
    patience: int = 100
    plateau: bool = False
    monitor: str = "loss"
    precision: str = "fp32"
    interval: int = 2000
    workers: int = 0
    hidden: int = 4
    stream: bool = False
    two: bool = False

def objective(model, batch): return F.mse_loss(model(batch[0]), batch[1])

def build(c, device):
    x = torch.randn(c.samples, 3, generator=torch.Generator().manual_seed(c.data_seed)); y = x.sum(1, keepdim=True)
    batches = Loader((x, y), batch_size=c.batch_size, seed=c.seed, num_workers=c.workers)
    if c.stream:
        batches = Stream(lambda epoch, start: [(x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)], length=6)
    torch.manual_seed(c.seed)
    def optimizer():
        if c.kind == "adam":
            return Optimizer(torch.optim.AdamW, lr=c.rate, betas=(c.beta, 0.999), weight_decay=c.decay, amsgrad=c.amsgrad)
        groups = [(lambda name, p: name.startswith("1."), {"lr": c.rate / 2})]
        return Optimizer(torch.optim.SGD, lr=c.rate, momentum=c.momentum, weight_decay=c.decay, groups=groups)
    def new():
        model = nn.Sequential(nn.Linear(3, c.hidden), nn.Linear(c.hidden, 1))
        with torch.no_grad():
            model[0].weight.mul_(c.gain)
        scale = LossScale(scale=16.0, growth_interval=c.interval) if c.precision == "fp16" else None
        return TrainState.create(model, optimizer(), seed=c.seed, precision=c.precision, loss_scale=scale)
    learning_rate = cosine_annealing(c.rate, total_steps=c.epochs * len(batches))
    def one(state, batch):
        state = optimizer_step(unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1e9))
        if c.plateau:
            return schedule(state, constant(state.plateau.learning_rate))
        return schedule(state, learning_rate) if c.scheduled else state
    state = schedule(new(), learning_rate) if c.scheduled else new()
    if c.two:
        state = {"a": state, "b": new()}
    def train_step(state, batch):
        return {n: one(state[n], batch) for n in ("b", "a")} if c.two else one(state, batch)
    def measure(state):
        state = state["a"] if c.two else state
        return {"loss": float(state.epoch), "other": -float(state.epoch)}
    return Recipe(state=state, train_step=train_step, batches=batches, epochs=c.epochs, evaluate=measure, monitor=c.monitor,
                  early_stopping=EarlyStopping(patience=c.patience, monitor=c.monitor), data=c.note,
                  plateau=ReduceLROnPlateau(lr=c.rate, patience=0, factor=0.5) if c.plateau else None)
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "small.py").write_text(RECIPE)
    return str(tmp_path / "small.py")


class Saying(QuietScreen):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def go_on(out, values=None, **options):
    """Resume it; what was said."""
    screen = Saying()
    train(out, values, resume=True, screen=screen, log_every=1, **options)
    return "\n".join(screen.notes)


def content(out):
    """Every file of a run with its bytes; what the lock leaves is none of it."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


def config(out):
    return json.loads((out / "config.json").read_bytes())


def parameters(out):
    from safetensors.torch import load_file

    return load_file(max((out / "checkpoints").glob("step-*")) / "model.safetensors")


def by_hand(values, cut, after, steps=18):
    """The same training as a loop: ``values`` up to the cut, ``after`` from there on; the final parameters."""
    import runpy

    module = runpy.run_path(values.pop("recipe"))
    start = module["Config"](**values)
    first = module["build"](start, torch.device("cpu"))
    then = module["build"](attrs.evolve(start, **after), torch.device("cpu"))
    state = first.state
    batches = [batch for epoch in range(3) for batch in first.batches.epoch(epoch)][:steps]
    for number, batch in enumerate(batches):
        if number == cut:
            hyper = then.state.hyper
            if start.scheduled:  # what the last line of the step before would have set
                rate = cosine_annealing(after.get("rate", start.rate), total_steps=18)(cut)
                hyper = tuple({**g, "lr": rate * factor} for g, factor in zip(hyper, (1.0, 0.5), strict=True))
            state = state.replace(hyper=hyper)
        state = (first if number < cut else then).train_step(state, batch)
    return state.params


@pytest.mark.parametrize(
    ("values", "after"),
    [
        ({}, {"rate": 0.01}),
        ({}, {"momentum": 0.5, "decay": 0.1}),
        ({"momentum": 0.9}, {"momentum": 0.5}),
        ({"kind": "adam"}, {"beta": 0.5, "rate": 0.01, "decay": 0.3}),
        ({"scheduled": True}, {"rate": 0.02}),
        ({"scheduled": True, "momentum": 0.3}, {"momentum": 0.9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [1, 8])
def test_hyperparameters_given_anew_count_from_the_next_step_on_through_schedule_and_groups(
    values, after, cut, recipe, tmp_path
):
    """The oracle is a loop by hand that changes them between the same two steps."""
    out = tmp_path / "run"
    train(out, values, recipe=recipe, limit_steps=cut)
    said = go_on(out, after)
    expected = by_hand({"recipe": recipe, **values}, cut, after)
    found = parameters(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name: config(out)["config"][name] for name in after} == after
    assert all(f"{name} " in said for name in after)
    resumed = next(line for line in lines(out) if line.get("event") == "resumed")
    assert {name: now for name, (_, now) in resumed["changed"].items()} == after


def test_a_resume_that_is_given_nothing_keeps_every_bit_and_says_nothing_of_changes(recipe, tmp_path):
    train(tmp_path / "whole", {"scheduled": True}, recipe=recipe)
    train(tmp_path / "run", {"scheduled": True}, recipe=recipe, limit_steps=7)
    said = go_on(tmp_path / "run")
    assert "given anew" not in said
    assert "->" not in said
    found, expected = parameters(tmp_path / "run"), parameters(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "changed" not in next(line for line in lines(tmp_path / "run") if line.get("event") == "resumed")


@pytest.mark.parametrize(
    ("values", "after", "error", "said"),
    [
        ({}, {"seed": 1}, ConfigError, "The seed is 0 in the checkpoint, and 1 is given"),
        ({}, {"hidden": 5}, CheckpointIncompatibleError, "This resume was given anew: hidden 4 -> 5"),
        ({}, {"gain": 2.0}, ConfigError, "gain 1.0 -> 2.0: this changes the weights that a run begins with"),
        (
            {},
            {"batch_size": 8},
            DataError,
            "batch 4 of epoch 2, and its batches would be others from there on",
        ),
        ({}, {"samples": 28}, DataError, "samples 24 -> 28"),
        ({}, {"data_seed": 2}, DataError, "These are not the data of the run: values of the data"),
        ({}, {"note": "found", "data_seed": 2}, DataError, "data made -> found"),
        ({}, {"epochs": 1}, ConfigError, "epochs=1, but the run is in its epoch 2 already. Give at least 2"),
        (
            {},
            {"kind": "adam"},
            CheckpointIncompatibleError,
            "optimizer: saved with SGD, but this state has AdamW",
        ),
        ({"kind": "adam"}, {"amsgrad": True}, ConfigError, "amsgrad cannot change in the middle of training"),
        ({}, {"precision": "bf16"}, CheckpointIncompatibleError, "precision: saved as fp32"),
        ({}, {"two": True}, CheckpointIncompatibleError, "The checkpoint holds a single state"),
        ({}, {"monitor": "lost"}, ConfigError, "names 'lost', which evaluate does not give"),
        ({}, {"unknown": 1}, ConfigError, "has no setting 'unknown'"),
        (
            {"stream": True},
            {},
            DataError,
            "its stream cannot begin in the middle. Begin the epoch anew by --restart-epoch",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_resume_that_is_refused_changes_nothing_and_the_plain_one_goes_on(
    values, after, error, said, recipe, tmp_path
):
    out = tmp_path / "run"
    train(out, values, recipe=recipe, limit_steps=10)
    before = content(out)
    with pytest.raises(error) as caught:
        go_on(out, after)
    assert said in str(caught.value)
    assert content(out) == before
    if after:
        go_on(out)
        assert lines(out)[-1]["attempted"] == 18


@pytest.mark.parametrize(
    "after",
    [{"batch_size": 8}, {"samples": 28}, {"data_seed": 2}, {"note": "found"}, {"stream": True}],
    ids=str,
)
def test_the_epoch_begins_anew_on_request_and_that_is_said_and_recorded(after, recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"stream": True} if "stream" in after else {}, recipe=recipe, limit_steps=8)
    said = go_on(out, {} if "stream" in after else after, restart_epoch=True)
    assert "epoch 2 begins anew: its first 2 batches are repeated" in said
    per_epoch = 3 if "batch_size" in after else 7 if "samples" in after else 6
    assert max(line["attempted"] for line in lines(out)) == 8 + 2 * per_epoch
    assert "given anew" not in go_on(out)  # it is the run's from now on


def test_another_batch_size_between_two_epochs_repeats_and_skips_nothing(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"epochs": 1}, recipe=recipe)
    said = go_on(out, {"epochs": 2, "batch_size": 8})
    assert "goes on with other batches: batches in an epoch 6 -> 3, batch_size 4 -> 8" in said
    assert max(line["attempted"] for line in lines(out)) == 6 + 3


@pytest.mark.parametrize("per_epoch", [3, 12])
def test_an_epoch_that_lacks_only_its_evaluation_is_whole_under_any_batch_size(per_epoch, recipe, tmp_path):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=6)  # the limit is met before the evaluation
    go_on(out, {"batch_size": 24 // per_epoch})
    assert max(line["attempted"] for line in lines(out)) == 6 + 2 * per_epoch


def test_more_patience_lets_a_stopped_run_go_on_and_without_it_the_reason_is_said(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"patience": 1, "epochs": 8}, recipe=recipe)
    stopped, before = max(line["attempted"] for line in lines(out)), len(lines(out))
    said = go_on(out)
    assert "early stopping has ended this run: loss did not improve in 1 evaluations (patience 1)" in said
    assert "--set patience=2" in said
    assert len(lines(out)) == before
    assert "its patience is 3 now" in go_on(out, {"patience": 3})
    assert max(line["attempted"] for line in lines(out)) == stopped + 2 * 6  # two bad checks more
    go_on(out, {"patience": 100})
    assert max(line["attempted"] for line in lines(out)) == 8 * 6


def test_another_monitored_metric_begins_with_no_best(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=13)
    said = go_on(out, {"monitor": "other"})
    assert "monitors other (min) instead of loss (min): no best so far" in said
    best = json.loads((out / "status.json").read_bytes())["best"]
    assert (best["metric"], best["value"]) == ("other", -2.0)


def test_a_plateau_takes_over_a_new_rate_as_often_lowered_as_before(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"plateau": True}, recipe=recipe, limit_steps=13)
    rates = [line["learning_rate"] for line in lines(out) if line["kind"] == "train"]
    assert rates[-1] == 0.05
    go_on(out, {"rate": 0.02})
    rates = [
        line["learning_rate"] for line in lines(out) if line["kind"] == "train" and line["attempted"] > 13
    ]
    assert rates[0] == 0.01


def test_the_rule_of_a_loss_scale_can_be_given_anew(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"precision": "fp16"}, recipe=recipe, limit_steps=4)
    assert "loss scale: growth_interval 2000 -> 2" in go_on(out, {"interval": 2})
    scales = [line["loss_scale"] for line in lines(out) if line["kind"] == "train"]
    assert scales[3] == 16.0
    assert scales[-1] > 16.0


def test_states_that_a_step_returns_in_another_order_lead_as_they_did_at_the_start(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, {"two": True, "patience": 1, "epochs": 8}, recipe=recipe)
    assert [line["metrics"]["loss"] for line in lines(out) if line["kind"] == "eval"] == [0.0, 1.0]
    assert config(out)["states"] == ["a", "b"]
    status = json.loads((out / "status.json").read_bytes())
    assert status["best"]["value"] == 0.0


def test_another_recipe_is_what_the_next_resume_goes_on_with(recipe, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    train(out, recipe=recipe, limit_steps=4)
    other.mkdir()
    (other / "helper.py").write_text("RATE = 0.03\n")
    text = RECIPE.replace("import attrs,", "import helper, attrs,").replace(
        "rate: float = 0.1", "rate: float = 0.1\n    new: int = 5"
    )
    (other / "second.py").write_text(text.replace("lr=c.rate, momentum", "lr=helper.RATE, momentum"))
    words = ["--limit-steps", "8", "--log-every", "1", "--device", "cpu", "--quiet"]
    assert call(["run", str(other / "second.py"), "--resume", str(out), *words]) == 0
    capsys.readouterr()
    about = config(out)
    assert (out / "recipe.py").read_text() == (other / "second.py").read_text()
    assert about["recipe"]["path"] == str(other / "second.py")
    assert about["config"]["new"] == 5
    rates = {
        line["learning_rate"] for line in lines(out) if line["kind"] == "train" and line["attempted"] > 4
    }
    assert rates == {0.03}
    assert "given anew" not in go_on(out)
    (other / "helper.py").write_text("RATE = 0.04\n")
    with pytest.raises(CheckpointIncompatibleError, match="Changed: module helper"):
        go_on(out, require_exact=True)
    assert "given anew: module helper" in go_on(out)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ({"rate": 0.2}, {}, "rate 0.1 -> 0.2"),
        ({"epochs": 4, "workers": 1}, {}, "epochs 3 -> 4, workers 0 -> 1"),
        ({}, {"compile": True}, "--compile False -> True"),
        ({"note": "x"}, {"restart_epoch": True}, "note made -> x"),
    ],
)
def test_an_exact_resume_refuses_every_setting_and_form_that_differ_by_name(
    values, options, said, recipe, tmp_path
):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=4)
    before = content(out)
    with pytest.raises(
        CheckpointIncompatibleError, match="--require-exact: the run would not go on as it was"
    ) as caught:
        go_on(out, values, require_exact=True, **options)
    assert said in str(caught.value)
    assert content(out) == before


def test_a_finished_run_that_is_resumed_keeps_metrics_times_and_log(recipe, tmp_path):
    out = tmp_path / "run"
    first = train(out, recipe=recipe)
    log = (out / "metrics.jsonl").read_bytes()
    again = train(out, resume=True)
    assert again == first
    assert (out / "metrics.jsonl").read_bytes() == log


def test_a_run_of_an_older_version_without_a_record_is_compared_as_far_as_it_says(recipe, tmp_path):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=5)
    about = config(out)
    for key in ("phases", "states"):
        del about[key]
    del about["recipe"]["modules"]
    about |= {"steploop": "0.0.9", "data": "worded otherwise"}
    (out / "config.json").write_text(json.dumps(about))
    go_on(out, {"rate": 0.01})
    rates = {
        line["learning_rate"] for line in lines(out) if line["kind"] == "train" and line["attempted"] > 5
    }
    assert rates == {0.01}


def test_data_that_differ_at_every_build_are_no_reason_to_refuse(recipe, tmp_path):
    Path(recipe).write_text(
        RECIPE.replace(
            "generator=torch.Generator().manual_seed(c.data_seed)",
            "generator=torch.Generator().manual_seed(torch.seed())",
        )
    )
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=5)
    assert "the recipe's data are not the same each time it is built" in go_on(out)


def test_a_recipe_that_changes_its_directory_writes_where_the_run_began(recipe, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    text = RECIPE.replace(
        "    x = torch.randn",
        f"    import os; os.chdir({str(tmp_path / 'elsewhere')!r})\n    x = torch.randn",
    )
    Path(recipe).write_text(text)
    monkeypatch.chdir(tmp_path)
    summary = train(Path("run"), recipe=recipe, limit_steps=2)
    assert summary.run == "run"
    assert (tmp_path / "run" / "status.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    os.chdir(tmp_path)
    carry_out(resume_request(Path("run"), None, {}, limit_steps=4, device="cpu"), QuietScreen())
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "phases",
    [
        3, [3], [{"data": 3}], [{"monitor": ["loss"]}], [{"plateau": ["x", "min"]}], [{"start": {"": 3}}],
        [{"start": {"": {"hyper": [3]}}}], [{"start": {"": {"hyper": [], "scale": 3}}}], [{"batches": {"per_epoch": "6"}}],
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_somebody_changed_is_one_sentence(phases, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=2)
    (out / "config.json").write_text(json.dumps(config(out) | {"phases": phases}))
    assert call(["resume", str(out), "--quiet", "--set", "rate=0.2"]) == 3
    said = capsys.readouterr().err
    assert "config.json: phases is damaged or was changed" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("stop", [4, 6])
def test_status_and_the_last_line_say_how_to_go_on_with_a_stream_that_cannot_begin_in_the_middle(
    stop, recipe, tmp_path, capsys
):
    out = tmp_path / "run"
    screen = Saying()
    train(out, {"stream": True}, recipe=recipe, screen=screen, limit_steps=1)
    assert "the stream cannot begin in the middle of an epoch" in "\n".join(screen.notes)
    summary = train(out, resume=True, stop_at=stop, restart_epoch=True, log_every=1)
    command = f"steploop resume {out}" + (" --restart-epoch" if summary.steps_attempted != 7 else "")
    assert summary.resume == command
    assert call(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"] == command
    assert call(command.split()[1:]) == 0


def test_the_form_that_auto_has_chosen_stays_at_a_resume(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=4)
    about = config(out) | {"compile": "auto"}
    (out / "config.json").write_text(json.dumps(about))
    chosen = []
    monkeypatch.setattr(
        "steploop.runs.phases.compiled",
        lambda made, mode, journal, screen, before: chosen.append((mode, before.form)) or made,
    )
    for form, expected in (("compiled", True), ("eager", False), (None, None)):
        kept = [line for line in lines(out) if line.get("event") != "compile"]
        kept += [{"kind": "event", "event": "compile", "note": "", "attempted": 1, "form": form}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
        train(out, resume=True, limit_steps=len(chosen) + 5)
        assert chosen[-1] == ("auto", expected)


@pytest.mark.parametrize(
    ("values", "options", "after", "said"),
    [
        (
            {},
            {},
            {"rate": 0.2},
            "rate 0.1 -> 0.2 would change nothing: .* has its 3 epochs. To go on, give more, as in --set epochs=6",
        ),
        ({}, {"limit_steps": 4}, {"rate": 0.2}, "rate 0.1 -> 0.2 would change nothing: .* --limit-steps 4"),
        ({"patience": 1}, {}, {"rate": 0.2}, "would change nothing: early stopping has ended this run"),
    ],
)
def test_what_would_be_recorded_and_never_happen_is_refused(values, options, after, said, recipe, tmp_path):
    out = tmp_path / "run"
    train(out, values, recipe=recipe, **options)
    before = content(out)
    with pytest.raises(ConfigError, match=said):
        go_on(out, after, **options)
    assert content(out) == before


class Gone(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("place", ["Phases._save_first", "Phases._go_on", "Loop.run"])
@pytest.mark.parametrize("values", [{}, {"scheduled": True}], ids=str)
def test_what_is_given_anew_counts_even_if_that_resume_is_killed_before_its_first_step(
    place, values, recipe, tmp_path, monkeypatch
):
    from steploop.runs.loop import Loop
    from steploop.runs.phases import Phases

    out, after = tmp_path / "run", {"rate": 0.01, "momentum": 0.5}
    train(out, values, recipe=recipe, limit_steps=5)
    kind, name = place.split(".")

    def gone(*_, **__):
        raise Gone

    with monkeypatch.context() as patch:
        patch.setattr({"Phases": Phases, "Loop": Loop}[kind], name, gone)
        with pytest.raises(Gone):
            go_on(out, after)
    go_on(out)
    found, expected = parameters(out), by_hand({"recipe": recipe, **values}, 5, after)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {name: config(out)["config"][name] for name in after} == after
    assert "unsaved" not in config(out)["phases"][0]


def test_what_is_given_anew_counts_even_if_that_resume_is_stopped_before_its_first_step(recipe, tmp_path):
    class Stopping(QuietScreen):
        def note(self, text):
            if text.startswith("going on"):
                flag.handle(signal.SIGTERM)

    out, flag, after = tmp_path / "run", StopFlag(), {"rate": 0.01}
    train(out, recipe=recipe, limit_steps=5)
    assert train(out, after, resume=True, screen=Stopping(), flag=flag).steps_attempted == 5
    go_on(out)
    found, expected = parameters(out), by_hand({"recipe": recipe}, 5, after)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_change_from_nothing_shows_the_empty_text():
    assert sentence([Change("note", "", "q"), Change("root", None, "x")]) == "note '' -> q, root none -> x"


def test_checkpoints_that_are_gone_are_missed(recipe, tmp_path):
    """Else the run would train again from its first step, and write over the log of what it has done."""
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=8)
    (out / "checkpoints").rename(tmp_path / "elsewhere")
    before = content(out)
    with pytest.raises(
        CheckpointDamagedError, match=r"names the checkpoint step-0+8, but .*checkpoints holds none"
    ):
        go_on(out)
    assert content(out) == before
    (tmp_path / "elsewhere").rename(out / "checkpoints")
    go_on(out)
    assert json.loads((out / "status.json").read_bytes())["step"] == 18


def test_an_exact_resume_without_a_checkpoint_refuses_what_is_given_anew(recipe, tmp_path):
    """A run that was killed before its first checkpoint begins anew, but as it was meant to be."""
    out = tmp_path / "run"
    train(out, recipe=recipe, limit_steps=1)
    shutil.rmtree(out / "checkpoints")
    (out / "status.json").write_text('{"state": "running"}')
    with pytest.raises(CheckpointIncompatibleError, match=r"--require-exact: .*rate 0\.1 -> 0\.5"):
        go_on(out, {"rate": 0.5}, require_exact=True)
    go_on(out, require_exact=True)
    assert (config(out)["config"]["rate"], json.loads((out / "status.json").read_bytes())["step"]) == (
        0.1,
        18,
    )
