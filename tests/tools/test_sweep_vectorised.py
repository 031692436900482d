"""Members that train as one population: each is near its single run, leaves, fails and is resumed by itself."""

import json
import os
import shutil
import signal
from pathlib import Path

import attrs
import pytest
import torch
import torch.nn.functional as F
from compiled_runs import run_as_it_is
from test_sweep import ended, forked
from torch import nn

import steploop
from steploop import (
    ConfigError,
    EarlyStopping,
    Optimizer,
    TrainState,
    accuracy,
    backward_scaled,
    checkpoint,
    evaluate,
    forward_loss,
    one_cycle,
    optimizer_step,
    schedule,
    unscale_and_clip,
)
from steploop.data import Loader
from steploop.errors import CheckpointDamagedError, CheckpointIncompatibleError
from steploop.recipe import Recipe
from steploop.tools.cli import call
from steploop.tools.sweep import populations
from steploop.tools.sweep.sweep_record import read_sweep
from steploop.tools.sweep.vectorise_record import read_vectorised

GRID = {"learning_rate": [0.01, 0.03]}
KILL = {"step": None, "by": signal.SIGKILL}  # from which attempted step on, and the signal


@pytest.fixture(autouse=True)
def _graphs_run_as_they_are(monkeypatch):
    run_as_it_is(monkeypatch)


@attrs.frozen
class Config:
    learning_rate: float = 0.01
    seed: int = 0
    hidden: int = 8
    epochs: int = 2
    patience: int = 10
    explode_above: float = 1.0  # with a higher rate, the loss is not finite from step 5 on
    kind: str = "plain"


def objective(model, batch):
    x, y = batch
    logits = model(x)
    return F.cross_entropy(logits, y), {"logits": logits}


class Counting(nn.Module):
    """Calls what torch.vmap has no rule for."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(x) + 0.0 * torch.histc(x, 1)


def plain_step(state, batch):
    return optimizer_step(
        unscale_and_clip(backward_scaled(forward_loss(state, batch, objective)), max_norm=1.0)
    )


class Tiny(nn.Module):
    """Dropout and BatchNorm; no bias before the norm, where its gradient would be rounding noise."""

    def __init__(self, hidden):
        super().__init__()
        self.first = nn.Linear(6, hidden, bias=False)
        self.norm = nn.BatchNorm1d(hidden)
        self.last = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.first(x)).relu(), 0.2, self.training))


def build(config: Config, device):
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(84, 6, generator=generator)  # ten batches of 8, and one of 4
    data = Loader((x, (x.sum(1) > 0).long()), batch_size=8, seed=config.seed)
    rate = one_cycle(config.learning_rate, total_steps=2 * len(data))
    explodes = config.learning_rate > config.explode_above

    def exploding(model, batch):
        loss, outputs = objective(model, batch)
        return loss * torch.where(model.first.weight.sum() > -1e9, torch.tensor(torch.nan), 1.0), outputs

    def train_step(state, batch):
        chosen = exploding if explodes and state.attempted_steps >= 5 else objective
        state = backward_scaled(forward_loss(state, batch, chosen))
        state = optimizer_step(unscale_and_clip(state, max_norm=1.0), max_nonfinite_steps=3)
        return schedule(state, rate)

    def measure(state):
        if KILL["step"] is not None and state.attempted_steps >= KILL["step"]:
            KILL["step"] = None
            os.kill(os.getpid(), KILL["by"])
        return evaluate(state, data.epoch(0), objective, {"accuracy": accuracy})

    state = TrainState.create(
        Counting() if config.kind == "counts" else Tiny(config.hidden), Optimizer(torch.optim.SGD, lr=config.learning_rate, momentum=0.9), seed=config.seed, device=device
    )  # fmt: skip
    recipe = Recipe(
        state=schedule(state, rate), train_step=train_step, batches=data, epochs=config.epochs, evaluate=measure,
        monitor="loss", eval_every_steps=4, early_stopping=EarlyStopping(patience=config.patience, min_delta=0.05),
    )  # fmt: skip
    if config.kind == "counts":
        return attrs.evolve(recipe, train_step=plain_step)
    if config.kind == "phases":
        return attrs.evolve(recipe, then=lambda state: attrs.evolve(recipe, epochs=1, state=state))
    if config.kind == "states":
        return attrs.evolve(recipe, state={"a": recipe.state})
    if config.kind == "fails":
        raise OSError("no such data")
    return recipe


def sweep(out=None, grid=None, **options):
    if "resume" not in options:
        options = {"device": "cpu", "vectorise": "on", "log_every": 3, **options}
    return steploop.sweep(build, grid, out=out, progress="none", **options)


def state_of(run, **settings):
    newest = max(Path(run).glob("checkpoints/step-*"))
    return checkpoint.load(newest, like=build(Config(**settings), torch.device("cpu")).state)


def assert_near(run, other, **settings):
    """The states of two runs, and what their logs say: within 1e-6 in what float32 holds."""
    one, two = state_of(run, **settings), state_of(other, **settings)
    assert (one.step, one.epoch, one.batch, one.attempted_steps) == (
        two.step,
        two.epoch,
        two.batch,
        two.attempted_steps,
    )
    for name, value in {**one.params, **one.buffers}.items():
        torch.testing.assert_close({**two.params, **two.buffers}[name], value, rtol=1e-6, atol=1e-6)
    mine, theirs = (
        [json.loads(line) for line in (Path(r) / "metrics.jsonl").read_text().splitlines()]
        for r in (run, other)
    )
    mine, theirs = ([x for x in lines if x.get("event") != "resumed"] for lines in (mine, theirs))
    assert [(sorted(x), x.get("step")) for x in mine] == [(sorted(x), x.get("step")) for x in theirs]
    for a, b in zip(mine, theirs, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, nan_ok=True)
        assert a.get("lr") == b.get("lr")
    for name in ("state", "ending", "step", "epoch"):
        assert status(run)[name] == status(other)[name], name


def status(run):
    return json.loads((Path(run) / "status.json").read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The members, each in a run of its own."""
    out = tmp_path_factory.mktemp("single") / "sweep"
    sweep(out, GRID, seeds=2, vectorise="off")
    return out


MEMBERS = [{"learning_rate": rate, "seed": seed} for rate in (0.01, 0.03) for seed in (0, 1)]


def assert_like_single(out, single):
    for number, settings in enumerate(MEMBERS):
        assert_near(out / f"{number:03d}", single / f"{number:03d}", **settings)


def test_each_member_is_near_its_single_run(single, tmp_path, capsys):
    """Dropout, BatchNorm, orders of their own, a last batch of another form, evaluations and the best checkpoint."""
    result = sweep(tmp_path / "sweep", GRID, seeds=2)
    assert_like_single(tmp_path / "sweep", single)
    assert (result.failed, len(result.members)) == ((), 4)
    assert read_vectorised(read_sweep(tmp_path / "sweep")).groups[0]["members"] == [0, 1, 2, 3]
    config = json.loads((tmp_path / "sweep" / "001" / "config.json").read_text())
    assert config["vectorised"] is True
    assert "epoch 2 step 20: loss" in (tmp_path / "sweep" / "logs" / "001.log").read_text()
    assert capsys.readouterr() == ("", "")


def test_members_that_share_their_batches(tmp_path):
    grid = {"learning_rate": [0.01, 0.02, 0.03], "seed": 5}
    sweep(tmp_path / "one", grid)
    sweep(tmp_path / "own", grid, vectorise="off")
    for number, rate in enumerate(grid["learning_rate"]):
        assert_near(
            tmp_path / "one" / f"{number:03d}", tmp_path / "own" / f"{number:03d}", learning_rate=rate, seed=5
        )


def test_a_member_that_fails_leaves_the_others_alone(tmp_path):
    """Of three, the last two are not finite any more; each says so as its single run does, and the first ends."""
    grid = {"learning_rate": [0.01, 0.02, 0.03], "explode_above": 0.015}
    result = sweep(tmp_path / "one", grid)
    sweep(tmp_path / "own", grid, vectorise="off")
    assert [m.state for m in result.members] == ["finished", "failed", "failed"]
    assert_near(tmp_path / "one" / "000", tmp_path / "own" / "000")
    said = [status(tmp_path / how / "001")["error"].replace(how, "") for how in ("one", "own")]
    assert said[0] == said[1]
    assert "NonFiniteError: 3 steps in a row" in said[0]
    assert len(list((tmp_path / "one" / "002" / "capsules").iterdir())) == 1


def test_members_stop_early_one_by_one(tmp_path):
    grid = {"learning_rate": [0.1, 0.03, 0.003, 0.001, 0.0003], "patience": 2}
    sweep(tmp_path / "one", grid)
    sweep(tmp_path / "own", grid, vectorise="off")
    for number, rate in enumerate(grid["learning_rate"]):
        assert_near(
            tmp_path / "one" / f"{number:03d}", tmp_path / "own" / f"{number:03d}", learning_rate=rate
        )
    assert len({status(tmp_path / "one" / f"{n:03d}")["step"] for n in range(5)}) > 1


@pytest.mark.parametrize("step", [4, 8, 22])
def test_killed_and_resumed_it_ends_as_if_it_had_not_been(step, single, tmp_path, monkeypatch):
    """Killed in an evaluation of the first member, when others have not saved that step: they meet again."""
    monkeypatch.setitem(KILL, "by", signal.SIGKILL)
    out = tmp_path / "sweep"

    def begin():
        KILL["step"] = step
        sweep(out, GRID, seeds=2)

    assert ended(forked(begin)) == -signal.SIGKILL
    result = sweep(resume=out)
    assert {m.state for m in result.members} == {"finished"}
    assert_like_single(out, single)


def test_members_at_different_steps_meet(single, tmp_path):
    """One has finished, one is back at its first checkpoint, one begins anew."""
    out = tmp_path / "sweep"
    sweep(out, GRID, seeds=2, limit_steps=13)
    shutil.rmtree(out / "001")
    for where in sorted((out / "002" / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(where)
    said = json.loads((out / "sweep.json").read_text())
    said["options"].pop("limit_steps")
    (out / "sweep.json").write_text(json.dumps(said))
    for run in ("000", "002", "003"):
        about = status(out / run) | {"state": "interrupted"}
        (out / run / "status.json").write_text(json.dumps(about))
    sweep(resume=out)
    assert {status(out / f"{n:03d}")["step"] for n in range(4)} == {22}
    for number, settings in enumerate(MEMBERS):
        one, two = (state_of(where / f"{number:03d}", **settings) for where in (out, single))
        for name, value in one.params.items():
            torch.testing.assert_close(two.params[name], value, rtol=1e-6, atol=1e-6)


def test_ctrl_c_saves_every_member_and_a_resume_goes_on(single, tmp_path, monkeypatch):
    monkeypatch.setitem(KILL, "step", 8)
    monkeypatch.setitem(KILL, "by", signal.SIGINT)
    result = sweep(tmp_path / "sweep", GRID, seeds=2)
    assert result.interrupted == signal.SIGINT
    assert [m.state for m in result.members] == ["interrupted"] * 4
    sweep(resume=tmp_path / "sweep")
    assert_like_single(tmp_path / "sweep", single)


def test_a_member_that_is_resumed_alone_says_so_and_is_not_exact(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(KILL, "step", 8)
    monkeypatch.setitem(KILL, "by", signal.SIGTERM)
    sweep(tmp_path / "sweep", GRID, seeds=1)
    run = tmp_path / "sweep" / "001"
    with pytest.raises(
        CheckpointIncompatibleError, match=r"--require-exact: .* Changed: vectorised True -> False"
    ):
        steploop.run(build, resume=run, require_exact=True, progress="none")
    assert steploop.run(build, resume=run, progress="plain").state == "finished"
    assert "given anew: vectorised True -> False" in capsys.readouterr().out
    assert "vectorised" not in json.loads((run / "config.json").read_text())


def test_each_shape_is_a_population(tmp_path):
    sweep(tmp_path / "sweep", {"learning_rate": [0.01, 0.03], "hidden": [4, 8]})
    said = read_vectorised(read_sweep(tmp_path / "sweep"))
    assert [one["members"] for one in said.groups] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"hidden": [4, 8]},
            r"member 000 .*: first\.weight of member 001 is \(8, 6\) .* but \(4, 6\) .* in member 000",
        ),
        ({**GRID, "kind": "phases"}, "member 000 .* several phases, each with a train step of its own"),
        ({**GRID, "kind": "states"}, "member 000 .* trains several states"),
        ({**GRID, "kind": "fails"}, "member 000 .*OSError: no such data"),
        (
            {"seed": [0, 1], "kind": "counts"},
            r"member 000 .*calls aten\.histc, which torch\.vmap has no rule for",
        ),
        ({"learning_rate": [0.01]}, "member 000 .*there is no other member to train it with"),
    ],
    ids=str,
)
def test_on_refuses_by_name_and_leaves_nothing(grid, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path / "sweep", grid)
    assert not (tmp_path / "sweep").exists()


def test_auto_trains_the_others_as_runs_of_their_own_and_says_why(tmp_path):
    result = sweep(tmp_path / "sweep", {**GRID, "kind": ["phases", "fails"]}, vectorise="auto", compile=False)
    assert [m.state for m in result.members] == ["finished", "failed", "finished", "failed"]
    said = read_vectorised(read_sweep(tmp_path / "sweep"))
    assert [(one["members"], one["reason"][:20]) for one in said.apart] == [
        ([0, 2], "its recipe has sever"),
        ([1, 3], "OSError: no such dat"),
    ]


@pytest.mark.parametrize("wins", [True, False])
def test_auto_takes_what_was_faster_and_says_so_in_one_line(wins, tmp_path, monkeypatch, capsys):
    times = {"population": 40e-6, "eager single": 30e-6 if wins else 10e-6}
    monkeypatch.setattr(populations, "_timed", lambda *_, **__: times)
    steploop.sweep(
        build, GRID, out=tmp_path / "sweep", device="cpu", vectorise="auto", compile=False, progress="plain"
    )
    figures = f"20 us for a step of each member as one population of 2, {30 if wins else 10} us as eager single steps, 1 at once"
    shown = capsys.readouterr().out
    assert f"000, 001: {figures}: {'the population' if wins else 'runs of their own'}\n" in shown
    said = read_vectorised(read_sweep(tmp_path / "sweep"))
    if wins:
        assert said.groups == ({"members": [0, 1], "figures": {"population": 20.0, "eager single": 30.0}},)
    else:
        assert said.apart == ({"members": [0, 1], "reason": figures},)
    assert ("vectorised" in json.loads((tmp_path / "sweep" / "000" / "config.json").read_text())) is wins


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"search": "optuna", "trials": 2},
            "--vectorise on and --search do not go together: a search proposes",
        ),
        ({"cluster": "local"}, "--vectorise on and --cluster do not go together: its members are jobs"),
        ({"vectorise": "yes"}, '--vectorise must be "auto", "on" or "off", but is \'yes\''),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_at_once(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path / "sweep", GRID, **options)
    assert not (tmp_path / "sweep").exists()


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--vectorise on and several ranks do not go together"):
        sweep(tmp_path / "sweep", GRID)


def test_a_resume_keeps_it_and_a_damaged_record_is_refused(tmp_path):
    out = tmp_path / "sweep"
    sweep(out, GRID)
    with pytest.raises(ConfigError, match="--vectorise and --resume are both given"):
        sweep(resume=out, vectorise="auto")
    (out / "vectorise.json").write_text(
        '{"format": 1, "mode": "on", "groups": [{"members": [7]}], "apart": []}'
    )
    with pytest.raises(CheckpointDamagedError, match=r"vectorise\.json is not what a sweep writes"):
        sweep(resume=out)


def test_the_command_line_takes_it(tmp_path, capsys):
    path = tmp_path / "tiny.py"
    path.write_text("from test_sweep_vectorised import Config, build\n")
    words = [
        "--set",
        "learning_rate=0.01,0.03",
        "--device",
        "cpu",
        "--vectorise",
        "on",
        "--out",
        str(tmp_path / "s"),
    ]
    assert call(["sweep", str(path), *words]) == 0
    assert "trying 000, 001 as one population" in capsys.readouterr().out
    assert json.loads((tmp_path / "s" / "001" / "config.json").read_text())["vectorised"] is True
