"""MLflow against a local store and Weights & Biases in its offline mode, for real; skipped without them."""

import os
import subprocess
import sys
import textwrap
import types

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
        for step, values in [(2, {{"train/loss": 1.75}}), *{VALUES!r}[1:], (3, {{"train/loss": 1.0}})]:
            again(step, values)  # a time, say, is another when a step is taken again: the first stays
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


# What .wandb files hold: a log as LevelDB writes it, of protocol buffers.
READ_HISTORY = """
import json, struct
from wandb.proto import wandb_internal_pb2

def history(path):
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
"""


def test_wandb_offline_holds_each_step_once_after_a_kill_and_after_a_stop(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed", exc_type=ImportError)
    (tmp_path / "first").mkdir()
    begin = """
        from pathlib import Path
        from steploop.runs.logs.wandb_logger import WandB
        logger = WandB(Path("first"), {}, mode="offline")
    """
    kill = "import os; os.killpg(0, 9)"  # wandb's own process too, with what it holds back

    def process(steps, end, rows=None):
        lines = [(n, {"train/loss": 1 / n}) for n in steps] + [(steps[-1], {"eval/loss": 0.5})]
        code = f"logger.rewrite({rows})\n" * (rows is not None) + f"for row in {lines}: logger(*row)\n{end}"
        done = subprocess.run(
            [sys.executable, "-c", f"{textwrap.dedent(begin)}\n{code}"],
            check=False, cwd=tmp_path, capture_output=True, text=True, timeout=600, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == (-9 if end == kill else 0), done.stderr

    process([1, 2, 3], "logger.close()")
    stand = [(n, {"train/loss": 1 / n}) for n in (1, 2, 3)] + [(3, {"eval/loss": 0.5})]
    process([4, 5, 6], kill, rows=stand)
    stand += [(n, {"train/loss": 1 / n}) for n in (4, 5)]  # a checkpoint was at step 5
    process([6, 7], "logger.close()", rows=stand)
    out = run_apart(
        READ_HISTORY
        + textwrap.dedent("""
        from pathlib import Path
        for path in sorted(Path("first/wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
            rows = list(history(path))
            print(path.stem, [r["applied_steps"] for r in rows if "train/loss" in r], [r["applied_steps"] for r in rows if "eval/loss" in r])
        """),
        tmp_path,
    )
    run, first, second = out.split()[0], *(line.split(" ", 1) for line in out.splitlines())
    assert [first, second] == [[run, "[1, 2, 3] [3]"], [run, "[4, 5, 6, 7] [7]"]]
    assert len([*(tmp_path / "first" / "wandb").glob("superseded-offline-run-*")]) == 1


def test_wandb_online_is_asked_how_far_it_got(tmp_path, monkeypatch):
    logged = []
    there = {"newest/train": 3, "newest/eval": 2, "applied_steps": 3}
    run = types.SimpleNamespace(
        id="abc", dir=str(tmp_path / "wandb" / "run-1" / "files"), offline=False, resumed=True, summary=there,
        log=logged.append, define_metric=lambda *_, **__: None, finish=lambda: None,
    )  # fmt: skip
    fake = types.SimpleNamespace(Settings=dict, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = WandB(tmp_path, {})
    logger.rewrite([(n, {"train/loss": 1 / n}) for n in (1, 2, 3, 4)] + [(3, {"eval/loss": 0.5})])
    logger(2, {"train/loss": 0.1})
    logger(5, {"train/loss": 0.2})
    logger.close()
    assert [(row["applied_steps"], *[name for name in row if "loss" in name]) for row in logged] == [
        (4, "train/loss"),
        (3, "eval/loss"),
        (5, "train/loss"),
    ]


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
