"""``steploop export`` and ``--init``: weights leave a run as they were evaluated, and begin another one."""

import json
import shutil

import attrs
import points_recipe
import pytest
import torch
from running import POINTS, changed, digest, lines, train
from safetensors.torch import load_file, save_file

from steploop import checkpoint
from steploop.errors import CheckpointIncompatibleError, ConfigError
from steploop.runs.from_python import run
from steploop.runs.initial_weights import InitialWeights
from steploop.tools.cli import call

QUICK = ["--device", "cpu", "--no-tune", "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that evaluates averages."""
    out = tmp_path_factory.mktemp("finished") / "run"
    summary = train(out, {"precision": "fp32"})
    return out, summary


def newest(out):
    return max((out / "checkpoints").glob("step-*"))


def measured(file):
    """The metrics of a plain module with the weights of a file, computed by hand."""
    config = points_recipe.Config(precision="fp32")
    model = points_recipe.build(config, torch.device("cpu")).state.model
    model.load_state_dict(load_file(file))
    model.eval()
    data = points_recipe.Points(20, 2)
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(data.x), data.y).item()


def test_what_was_evaluated_is_exported_and_gives_the_metric_that_was_reported(finished, tmp_path, capsys):
    out, summary = finished
    file = tmp_path / "w.safetensors"
    assert call(["export", str(out), str(file), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["weights"], about["checkpoint"], about["tensors"]) == (
        "average",
        str(newest(out)),
        len(load_file(file)),
    )
    assert measured(file) == pytest.approx(summary.metrics["loss"], abs=1e-6)
    assert call(["export", str(out), str(file), "--raw", "--overwrite"]) == 0
    assert f"the raw weights of {newest(out)}" in capsys.readouterr().out
    assert measured(file) != pytest.approx(summary.metrics["loss"], abs=1e-6)
    assert all(
        torch.equal(t, load_file(newest(out) / "model.safetensors")[name])
        for name, t in load_file(file).items()
    )


def test_the_best_checkpoint_can_be_exported(tmp_path, capsys):
    values = iter([9.0, 1.0, 2.0, 3.0])  # the first is the trial's
    recipe = changed(tmp_path, lambda made, _: attrs.evolve(made, evaluate=lambda _: {"loss": next(values)}))
    train(tmp_path / "run", {"epochs": 3, "precision": "fp32"}, recipe=recipe)
    assert (
        call(["export", str(tmp_path / "run"), str(tmp_path / "w.safetensors"), "--best", "--raw", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["checkpoint"].endswith("step-000000000007")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--raw", "--average"], "--raw and --average are both given"),
        (["--state", "a"], "There is no state 'a'"),
    ],
)
def test_an_export_that_cannot_be_is_one_sentence(words, said, finished, tmp_path, capsys):
    assert call(["export", str(finished[0]), str(tmp_path / "w.safetensors"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


def test_a_run_that_does_not_say_which_weights_it_evaluated_asks(finished, tmp_path, capsys):
    assert (
        call(["export", str(newest(finished[0])), str(tmp_path / "w.safetensors")]) == 0
    )  # its run is around it
    copied = checkpoint.open_checkpoint(newest(finished[0])).directory
    shutil.copytree(copied, tmp_path / "alone")
    capsys.readouterr()
    assert call(["export", str(tmp_path / "alone"), str(tmp_path / "x.safetensors")]) == 2
    assert "Say --raw or --average" in capsys.readouterr().err


def weights_of_first_state(out):
    """What config.json says the run began with."""
    return json.loads((out / "config.json").read_bytes())["phases"][0]["start"][""]["weights"]


@pytest.mark.parametrize("kind", ["run", "checkpoint", "exported", "renamed"])
def test_a_run_begins_with_given_weights_and_nothing_else_of_theirs(kind, finished, tmp_path, capsys):
    source, out = finished[0], tmp_path / "run"
    place, words = {"run": source, "checkpoint": newest(source)}.get(kind, tmp_path / "w.safetensors"), []
    if kind in {"exported", "renamed"}:
        assert call(["export", str(source), str(place), "--raw"]) == 0
    if kind == "renamed":
        save_file({f"net.{n}": t for n, t in load_file(place).items()}, place)
        words = ["--init-rename", "net="]
    capsys.readouterr()
    command = ["run", POINTS, "--out", str(out), "--set", "precision=fp32", "--init", str(place), *words]
    assert call([*command, "--limit-steps", "1", "--device", "cpu", "--log-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "tensors loaded from" in said
    assert [line["attempted"] for line in lines(out) if line["kind"] == "train"] == [1]
    about = json.loads((out / "config.json").read_bytes())
    assert about["init"]["path"] == str(place)
    by_hand = points_recipe.build(points_recipe.Config(precision="fp32"), torch.device("cpu"))
    state = checkpoint.load_weights(newest(source), into=by_hand.state)
    state = by_hand.train_step(state, next(iter(by_hand.batches.epoch(0))))
    found = load_file(newest(out) / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in state.params.items())


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again_with_its_weights(finished, tmp_path):
    options = {"device": "cpu", "progress": "none", "log_every": 1, "precision": "fp32"}
    whole = run(POINTS, out=tmp_path / "whole", init=finished[0], **options)
    run(POINTS, out=tmp_path / "run", init=finished[0], limit_steps=1, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    status = tmp_path / "run" / "status.json"  # which names none yet
    status.write_text(json.dumps({**json.loads(status.read_bytes()), "checkpoint": None}))
    again = run(resume=tmp_path / "run", device="cpu", progress="none")
    assert again.metrics == whole.metrics
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_weights_that_do_not_fit_leave_no_run(finished, tmp_path, capsys):
    command = ["run", POINTS, "--out", str(tmp_path / "run"), *QUICK, "--init", str(finished[0])]
    assert call([*command, "--set", "widths=9"]) == 3
    assert "0.weight: (8, 6) in the file, (9, 6) here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert (
        call(
            [
                *command,
                "--set",
                "widths=9",
                "--set",
                "precision=fp32",
                "--init-partial",
                "*",
                "--limit-steps",
                "1",
            ]
        )
        == 0
    )


def test_options_of_init_without_it_and_init_at_a_resume_are_refused(finished, tmp_path, capsys):
    assert call(["run", POINTS, "--init-partial", "x", "--out", str(tmp_path / "run")]) == 2
    assert "are about --init" in capsys.readouterr().err
    assert call(["run", "--resume", str(finished[0]), "--init", str(finished[0])]) == 2
    assert "--init and --resume are both given" in capsys.readouterr().err
    with pytest.raises(CheckpointIncompatibleError):
        run(
            POINTS,
            out=tmp_path / "run",
            init=InitialWeights(path=finished[0], rename={"0": "nine"}),
            device="cpu",
            progress="none",
        )
    with pytest.raises(ConfigError, match="There are no weights at"):
        run(POINTS, out=tmp_path / "run", init="nowhere", device="cpu", progress="none")
