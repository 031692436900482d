"""MLflow against a local store and Weights & Biases in its offline mode, for real; skipped without them."""

import os
import subprocess
import sys
import textwrap

import pytest

from steploop.errors import MissingExtraError
from steploop.runs.logs.mlflow_logger import MLflow
from steploop.runs.logs.wandb_logger import WandB

VALUES = [(1, {"train/loss": 2.5}), (2, {"train/loss": 1.5, "eval/accuracy": 0.5}), (2, {"eval/loss": 1.25})]


def run_apart(code, folder):
    """Run code in a process of its own: both services start threads and warn, which is their business."""
    environment = os.environ | {
        "WANDB_SILENT": "true",
        "MLFLOW_ENABLE_TELEMETRY": "false",
        "DO_NOT_TRACK": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mlflow_holds_what_was_logged(tmp_path):
    pytest.importorskip("mlflow.tracking", reason="the extra mlflow is not installed", exc_type=ImportError)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    out = run_apart(
        f"""
        from pathlib import Path
        from steploop.runs.logs.mlflow_logger import MLflow
        logger = MLflow(Path("runs/first"), {{"lr": 0.1, "text": "x" * 9000}})
        for step, values in {VALUES!r}:
            logger(step, values)
        logger.close()

        from mlflow.tracking import MlflowClient
        client = MlflowClient(tracking_uri="sqlite:///runs/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("steploop").experiment_id])
        print(run.info.run_name, run.info.status, run.data.params["lr"], len(run.data.params["text"]))
        history = client.get_metric_history(run.info.run_id, "train/loss")
        print([(m.step, m.value) for m in sorted(history, key=lambda m: m.step)], run.data.metrics["eval/accuracy"])

        again = MLflow(Path("runs/first"), {{"lr": 0.2, "new": 1}})  # as a resume does
        print(client.get_run(run.info.run_id).info.status)
        for step, values in [*{VALUES!r}[1:], (3, {{"train/loss": 1.0}})]:
            again(step, values)
        again.close()
        (run,) = client.search_runs([client.get_experiment_by_name("steploop").experiment_id])
        history = client.get_metric_history(run.info.run_id, "train/loss")
        print(sorted((m.step, m.value) for m in history))
        print(run.info.status, run.data.params["lr"], run.data.params["new"], run.data.tags["resumed.lr"])
        client.delete_run(run.info.run_id)
        MLflow(Path("runs/first"), {{}}).close()
        print(len(client.search_runs(["1"])), len(client.search_experiments(filter_string="name = 'steploop'")))
        """,
        tmp_path,
    )
    assert out.splitlines() == [
        "first FINISHED 0.1 6000",
        "[(1, 2.5), (2, 1.5)] 0.5",
        "RUNNING",
        "[(1, 2.5), (2, 1.5), (3, 1.0)]",
        "FINISHED 0.1 1 0.2",
        "1 1",
    ]
    assert (tmp_path / "runs" / "mlflow.db").is_file()


def test_wandb_writes_its_files_offline(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed", exc_type=ImportError)
    (tmp_path / "first").mkdir()
    out = run_apart(
        f"""
        from pathlib import Path
        from steploop.runs.logs.wandb_logger import WandB
        logger = WandB(Path("first"), {{"lr": 0.1}}, mode="offline")
        for step, values in {VALUES!r}:
            logger(step, values)
        print(logger._run.name, logger._run.config["lr"], dict(logger._run.summary)["train/loss"])
        logger.close()
        again = WandB(Path("first"), {{"lr": 0.2}}, mode="offline")
        print(again._run.id == logger._run.id)
        again.close()
        """,
        tmp_path,
    )
    assert out.splitlines()[-2:] == ["first 0.1 1.5", "True"]
    written = [*(tmp_path / "first" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert len({path.name for path in written}) == 1
    data = b"".join(path.read_bytes() for path in written)
    assert b"eval/accuracy" in data
    assert b"applied_steps" in data


@pytest.mark.parametrize(
    ("logger", "module", "extra"), [(MLflow, "mlflow", "mlflow"), (WandB, "wandb", "wandb")]
)
def test_without_the_extra_the_message_names_it(tmp_path, monkeypatch, logger, module, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        logger(tmp_path, {})
    assert f"pip install 'steploop[{extra}]'" in str(caught.value)
