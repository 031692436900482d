"""A sweep: its members are ordinary runs, a kill changes nothing, failures are contained, the table is right."""

import json
import os
import signal
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import attrs
import points_recipe
import pytest
import torch
from points_recipe import Config
from rich.console import Console
from running import POINTS, Forked, digest, train, wait_until

import steploop
from steploop.errors import CheckpointIncompatibleError, ConfigError, RunExistsError, RunLockedError
from steploop.runs.directory_lock import run_lock
from steploop.runs.signals import StopFlag
from steploop.tools.cli import call
from steploop.tools.sweep.conductor import conduct
from steploop.tools.sweep.sweep_record import read_sweep
from steploop.tools.sweep.sweep_screens import LiveSweep, QuietSweep
from steploop.tools.sweep.trials import PruningLogger

GRID = {"learning_rate": [0.01, 0.1], "widths": [[8], [8, 4]]}
KILL = {"left": None, "by": signal.SIGKILL}  # how many steps until the process gets the signal


def build(config: Config, device):
    recipe = points_recipe.build(config, device)

    def train_step(state, batch):
        if KILL["left"] is not None:
            KILL["left"] -= 1
            if KILL["left"] == 0:
                os.kill(os.getpid(), KILL["by"])
        return recipe.train_step(state, batch)

    return attrs.evolve(recipe, train_step=train_step)


def sweep(out=None, grid=None, *, recipe=build, **options):
    if "resume" not in options:
        options = {"device": "cpu", **options}
    return steploop.sweep(recipe, grid, out=out, progress="none", **options)


def forked(function):
    """The exit code, or minus the signal, of a child that calls a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digests(out):
    return {
        path.name: digest(path)
        for path in sorted(Path(out).iterdir())
        if any(path.glob("checkpoints/step-*"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    return out, sweep(out, GRID, seeds=2)


def test_a_member_is_the_run_of_its_settings(whole, tmp_path):
    """Of the last combination, by the run that the command line begins; and the table by hand."""
    out, result = whole
    train(tmp_path / "run", {"learning_rate": 0.1, "widths": [8, 4], "seed": 1})
    assert digest(out / "007") == digest(tmp_path / "run")
    assert sorted(digests(out)) == [f"{n:03d}" for n in range(8)]
    best = [json.loads((out / f"{n:03d}" / "status.json").read_text())["best"]["value"] for n in range(8)]
    means = sorted(
        (statistics.fmean(best[n : n + 2]), statistics.stdev(best[n : n + 2])) for n in range(0, 8, 2)
    )
    assert [(row.mean, row.spread) for row in result.rows] == [pytest.approx(pair) for pair in means]
    assert result.best is result.rows[0]
    assert (result.metric, result.mode, result.failed, result.interrupted) == ("loss", "min", (), None)
    heads, first, *_ = str(result).splitlines()
    assert heads.split() == ["learning_rate", "widths", "loss", "spread", "seeds", "time", "state"]
    assert "2/2" in first
    assert "best" in result._repr_html_()
    assert json.loads(json.dumps(result.to_json()))["finished"] == 8


@pytest.mark.parametrize("step", [1, 20, 71])
def test_a_sweep_that_was_killed_and_resumed_is_as_if_it_had_not_been(step, whole, tmp_path):
    """Killed in the first step of all, in the middle of its second member, and of its sixth."""
    out = tmp_path / "sweep"

    def begin():
        KILL["left"] = step
        sweep(out, GRID, seeds=2)

    assert ended(forked(begin)) == -signal.SIGKILL
    begun = len([path for path in out.iterdir() if (path / "config.json").exists()])
    assert begun == -(-step // 14)
    result = sweep(resume=out)
    assert digests(out) == digests(whole[0])
    assert [(row.settings, row.values) for row in result.rows] == [
        (row.settings, row.values) for row in whole[1].rows
    ]


def test_what_is_finished_is_not_run_again(whole):
    before = {
        path: path.stat().st_mtime_ns
        for path in whole[0].rglob("*")
        if path.is_file() and "lock" not in path.name
    }
    result = sweep(resume=whole[0])
    assert [row.mean for row in result.rows] == [row.mean for row in whole[1].rows]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_ctrl_c_ends_the_member_in_hand_and_a_resume_goes_on(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(KILL, "left", 20)
    monkeypatch.setitem(KILL, "by", signal.SIGINT)
    result = sweep(tmp_path / "sweep", GRID, seeds=2)
    assert result.interrupted == signal.SIGINT
    assert [m.state for m in result.members] == ["finished", "interrupted", *["waiting"] * 6]
    assert sweep(resume=tmp_path / "sweep").interrupted is None
    assert digests(tmp_path / "sweep") == digests(whole[0])


def test_a_member_that_fails_does_not_end_the_others(tmp_path, capsys):
    """One explodes in its steps, one cannot even be built; a resume tries them again, and no other."""

    def fragile(config: Config, device):
        if config.samples == 3:
            raise KeyError("no such samples")
        return points_recipe.build(config, device)

    grid = {"samples": [28, 3, 24], "explode_at": [-1, 0], "precision": "fp32"}
    result = sweep(tmp_path / "sweep", grid, recipe=fragile)
    assert [m.state for m in result.members] == [
        "finished",
        "failed",
        "failed",
        "failed",
        "finished",
        "failed",
    ]
    assert {m.number: m.error.split(":")[0] for m in result.failed} == {
        1: "NonFiniteError", 2: "KeyError", 3: "KeyError", 5: "NonFiniteError",
    }  # fmt: skip
    assert [row.mean is None for row in result.rows] == [False, False, True, True, True, True]
    assert "no such samples" in capsys.readouterr().err
    kept = digests(tmp_path / "sweep")

    def mended(config: Config, device):
        return fragile(config, device)

    with pytest.raises(CheckpointIncompatibleError, match=r"was begun with other code\. Changed: recipe"):
        sweep(resume=tmp_path / "sweep", recipe=mended)
    again = sweep(resume=tmp_path / "sweep", recipe=fragile)
    assert len(again.failed) == 4
    assert digests(tmp_path / "sweep") == kept


def test_a_recipe_that_monitors_nothing_keeps_the_order_of_the_grid(tmp_path):
    def silent(config: Config, device):
        return attrs.evolve(points_recipe.build(config, device), monitor=None, early_stopping=None)

    result = sweep(tmp_path / "sweep", {"learning_rate": [0.1, 0.01], "epochs": 1}, recipe=silent)
    assert result.mode is None
    assert result.best is None
    assert [row.settings["learning_rate"] for row in result.rows] == [0.1, 0.01]


def test_what_cannot_be_is_refused_before_anything_is_written(whole, tmp_path):
    out = tmp_path / "sweep"
    cases = [
        ({"grid": {"rate": [1]}}, "build has no setting 'rate'"),
        ({"grid": {"learning_rate": [0.1, "fast"]}}, "learning_rate must be float, but got 'fast'"),
        ({"grid": {"learning_rate": "0.1..1"}}, "is a range, and a grid needs values"),
        ({"grid": {"seed": [1, 2]}, "seeds": 2}, "--seeds and --set seed are both given"),
        ({"grid": GRID, "trials": 3}, "--trials is about a search"),
        ({"grid": GRID, "search": "optuna"}, "A search needs --trials N"),
        ({"grid": {"epochs": 1}, "search": "optuna", "trials": 2}, "A search needs something to look for"),
        ({"grid": GRID, "search": "other"}, 'search must be "grid" or "optuna", but is \'other\''),
        ({"grid": GRID, "prune": False}, "are about a search. Give --search optuna too"),
        ({"grid": GRID, "jobs": 2}, "A function is known to this process alone"),
        ({"grid": GRID, "cluster": "slurm"}, "A function is known to this process alone"),
        ({"grid": GRID, "batch": 2}, "steploop.sweep has no option 'batch'"),
        ({"grid": {"seed": range(10_000), "epochs": range(11)}}, "The sweep has 110,000 members"),
        (
            {"grid": GRID, "recipe": points_recipe.build(Config(), torch.device("cpu"))},
            "A Recipe is one value",
        ),
        ({"grid": GRID, "recipe": None}, "Which recipe? Give a file or a name"),
        ({"grid": GRID, "recipe": POINTS, "cluster_options": {"a": 1}}, "--cluster-set is about a cluster"),
    ]
    for given, message in cases:
        with pytest.raises(ConfigError) as raised:
            sweep(out, **given)
        assert message in str(raised.value)
        assert not out.exists() or "cluster-set" in message
    done = whole[0]
    for given, message in [
        ({"grid": GRID}, "--set and --resume are both given"),
        ({"seeds": 3}, "--seeds and --resume are both given"),
        ({"limit_steps": 3}, "--limit-steps and --resume are both given"),
        ({"recipe": POINTS}, "A recipe and --resume are both given"),
        ({"trials": 3}, "--trials is about a search, and this sweep is a grid"),
    ]:
        with pytest.raises(ConfigError) as raised:
            sweep(resume=done, **given)
        assert message in str(raised.value)
    with pytest.raises(
        RunExistsError, match=r"holds a sweep already\. Go on with it by steploop sweep --resume"
    ):
        sweep(done, GRID)
    with pytest.raises(ConfigError, match=r"holds no sweep \(there is no sweep.json\)"):
        sweep(resume=tmp_path)
    with run_lock(done), pytest.raises(RunLockedError, match="is in use by process"):
        sweep(resume=done)


def test_the_command_survives_the_kill_of_its_process_alone_and_says_what_failed(tmp_path):
    """Its members see that the sweep is gone, save and end. One of the two explodes; the other is the run of its settings."""
    out = tmp_path / "sweep"
    first = Forked(
        tmp_path, "sweep", POINTS, "--set", "explode_at=-1,9", "--set", "step_s=0.03", "--set", "precision=fp32", "--out",
        str(out), "--checkpoint-every", "1", "--device", "cpu", "--jobs", "2",
    )  # fmt: skip
    first.wait_for((out / "000" / "checkpoints").is_dir)
    first.kill()
    second = Forked(tmp_path, "sweep", "--resume", str(out), "--jobs", "2")
    code, printed, said = second.end()
    assert code == 1, said
    rows = [line.split() for line in printed.splitlines() if line.startswith(("explode_at", "-1", "9"))]
    assert [(row[0], row[-1]) for row in rows] == [
        ("explode_at", "state"),
        ("-1", "finished"),
        ("9", "failed"),
    ]
    assert "001 failed: NonFiniteError" in said
    assert f"1 of 2 runs failed; see {out}/logs. Try them again with: steploop sweep --resume {out}" in said
    assert '"resumed"' in (out / "000" / "metrics.jsonl").read_text()
    train(tmp_path / "run", {"step_s": 0.03, "precision": "fp32"}, checkpoint_every=1)
    assert digest(out / "000") == digest(tmp_path / "run")


@pytest.fixture
def optuna():
    return pytest.importorskip("optuna")


SPACE = {
    "learning_rate": "1e-3..1:log",
    "widths": [[8], [4, 4]],
    "patience": "5..9",
    "epochs": 4,
    "precision": "fp32",
}


def trials(optuna, out):
    storage = optuna.storages.RDBStorage(f"sqlite:///{out}/study.db")
    try:
        return optuna.load_study(study_name="steploop", storage=storage).trials
    finally:  # Python 3.13 warns of a database that nobody closed
        storage.remove_session()
        storage.engine.dispose()


def test_a_search_that_was_killed_and_resumed_is_as_if_it_had_not_been(optuna, tmp_path, capsys):
    """Twenty trials, some of them pruned; the other search is killed in three of its runs."""
    options = {"search": "optuna", "trials": 20, "search_seed": 3}
    result = sweep(tmp_path / "whole", SPACE, **options)
    assert [m.number for m in result.members] == list(range(20))
    assert {m.state for m in result.members} >= {"finished", "pruned"}

    def killed_after(steps, **given):
        def go():
            KILL["left"] = steps
            sweep(**given)

        assert ended(forked(go)) == -signal.SIGKILL

    out = tmp_path / "killed"
    killed_after(30, out=out, grid=SPACE, **options)
    killed_after(100, resume=out)
    killed_after(60, resume=out)
    again = sweep(resume=out)
    assert digests(out) == digests(tmp_path / "whole")
    assert [(m.settings, m.state, m.value) for m in again.members] == [
        (m.settings, m.state, m.value) for m in result.members
    ]
    states = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    for place in (out, tmp_path / "whole"):
        assert [t.state.name for t in trials(optuna, place)] == [states[m.state] for m in result.members]


def test_two_processes_share_the_trials_of_one_storage(optuna, tmp_path):
    out = tmp_path / "sweep"
    grid = {**SPACE, "epochs": 1, "step_s": 0.02}
    sweep(out, grid, search="optuna", trials=1, prune=False)
    child = forked(lambda: sweep(resume=out, trials=8))
    wait_until((out / "001" / "config.json").exists)
    sweep(resume=out, trials=8)
    assert ended(child) == 0
    found, too_many = (all_of := trials(optuna, out))[:8], all_of[8:]
    assert [t.state.name for t in found] == ["COMPLETE"] * 8
    assert {t.state.name for t in too_many} <= {
        "FAIL"
    }  # both asked for the last one at once: nobody ran the second
    assert len({t.user_attrs["worker"] for t in found[1:]}) == 2
    assert len({tuple(t.params.items()) for t in found}) == 8
    assert len(digests(out)) == 8
    assert list((out / "workers").iterdir()) == []


def test_a_search_refuses_a_recipe_that_monitors_nothing(optuna, tmp_path):
    def silent(config: Config, device):
        return attrs.evolve(points_recipe.build(config, device), monitor=None, early_stopping=None)

    with pytest.raises(ConfigError, match="silent monitors no metric, and a search needs one"):
        sweep(tmp_path / "sweep", SPACE, recipe=silent, search="optuna", trials=2)


def test_members_are_jobs_of_submitit(tmp_path):
    """Its executor for one machine; the run is that of the settings."""
    pytest.importorskip("submitit")
    out = tmp_path / "sweep"
    result = steploop.sweep(
        POINTS, {"epochs": 1, "learning_rate": [0.01]}, out=out, cluster="local", cluster_options={"timeout_min": "5"},
        device="cpu", progress="none",
    )  # fmt: skip
    assert [m.state for m in result.members] == ["finished"]
    train(tmp_path / "run", {"epochs": 1, "learning_rate": 0.01})
    assert digest(out / "000") == digest(tmp_path / "run")
    with pytest.raises(ConfigError, match='--cluster must be "slurm" or "local", but is \'pbs\''):
        steploop.sweep(POINTS, {"epochs": 1}, out=tmp_path / "other", cluster="pbs", progress="none")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"A search needs optuna.*pip install 'steploop\[optuna\]'"):
        sweep(tmp_path / "sweep", SPACE, search="optuna", trials=2)


def test_the_report_of_a_sweep_has_its_table_and_figures(whole, tmp_path, capsys):
    out, result = whole
    assert call(["report", str(out), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    for words in (
        "Sweep of build: 8 runs", "8 of 8", "loss against learning_rate", "loss against widths", "Settings and loss",
        "Result, best first",
    ):  # fmt: skip
        assert words in page
    assert page.index(f"learning_rate={result.rows[0].settings['learning_rate']}") < page.index(
        "Result, best first"
    )
    assert page.count('class="s c') >= 8
    assert call(["report", str(out), str(out / "000")]) == 2
    assert "is a sweep, and is shown alone" in capsys.readouterr().err


def test_the_plot_of_a_sweep_is_a_figure_for_each_setting(whole, tmp_path, capsys):
    assert call(["plot", str(whole[0]), "--out", str(tmp_path / "s.png")]) == 0
    drawn = (tmp_path / "s.svg").read_text()
    for words in ("loss against learning_rate", "loss against widths", "Parallel coordinates"):
        assert words in drawn
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert call(["plot", str(whole[0]), "--metric", "loss"]) == 2
    assert "--metric and --terminal are about curves of runs" in capsys.readouterr().err


def test_a_sweep_that_is_resumed_as_a_run_says_what_to_do(whole, capsys):
    assert call(["resume", str(whole[0])]) == 2
    assert (
        f"is a sweep of many runs. Go on with it by steploop sweep --resume {whole[0]}"
        in capsys.readouterr().err
    )


class Endless:
    """A member that runs until it is stopped."""

    def __init__(self):
        self.stopped = 0

    def poll(self):
        return None if not self.stopped else 75

    def stop(self):
        self.stopped += 1


class Launcher:
    """Starts one member; the next one cannot be started, or ``then`` is called instead."""

    def __init__(self, then=None):
        self.first, self.then = Endless(), then

    def start(self, number):
        if number == 0:
            return self.first
        if self.then is None:
            raise OSError("no room")
        self.then()
        return Endless()


class Numbers:
    def __init__(self, n):
        self.left = list(range(n))

    def take(self):
        return self.left.pop(0) if self.left else None

    def pending(self):
        return bool(self.left)

    def ended(self, number, code):
        pass


def test_an_error_leaves_no_member_that_nobody_watches():
    launcher = Launcher()
    with pytest.raises(OSError, match="no room"):
        conduct(Numbers(2), launcher, jobs=2, watcher=QuietSweep(), stop=StopFlag())
    assert launcher.first.stopped == 1


def test_a_signal_stops_each_member_once_and_starts_no_other():
    stop, numbers = StopFlag(), Numbers(5)
    launcher = Launcher(lambda: stop.handle(signal.SIGTERM))
    conduct(numbers, launcher, jobs=3, watcher=QuietSweep(), stop=stop)
    assert launcher.first.stopped == 1
    assert numbers.left == [2, 3, 4]


def test_a_terminal_shows_the_members_that_run(whole, capsys):
    """A table of them, and above it a line for each that has ended."""
    console = Console(file=sys.stdout, force_terminal=True, width=100)
    screen = LiveSweep(read_sweep(whole[0]), console)
    screen.show([3, 5])
    screen.ended(2, 0)
    screen.close()
    shown = capsys.readouterr().out
    for words in (
        "best so far",
        "003",
        "learning_rate=0.01 widths=8,4 seed=1",
        "14",
        "002 (9 of 8)",
        "finished in",
    ):
        assert words in shown


def test_showing_a_sweep_does_not_wait_for_torch(whole, tmp_path):
    program = (
        "import sys; from steploop.tools.cli import call; code = call(['report', sys.argv[1], '--out', sys.argv[2]]); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, whole[0], tmp_path / "r.html"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False"


class FakeTrial:
    """Optuna's, that would prune."""

    def __init__(self):
        self.reported = []

    def report(self, value, step):
        self.reported.append((step, value))

    def should_prune(self):
        return bool(self.reported) and self.reported[-1][1] > 1


def test_an_evaluation_is_reported_once_and_a_bad_one_stops_the_run():
    trial, stop = FakeTrial(), StopFlag()
    logger = PruningLogger(trial, "eval/loss", stop, reported=[3])
    for step, values in [
        (3, {"eval/loss": 0.5}),
        (4, {"train/loss": 9.0}),
        (6, {"eval/loss": 0.4}),
        (9, {"eval/loss": 2.0}),
    ]:
        assert stop.signum is None
        logger(step, values)
    assert trial.reported == [(6, 0.4), (9, 2.0)]
    assert (logger.pruned, stop.signum) == (True, signal.SIGTERM)


@pytest.mark.parametrize(("rows", "pruned"), [([3, 6], True), ([3], False), ([], False)])
def test_a_verdict_that_a_kill_has_lost_is_given_again_where_it_was_given(rows, pruned):
    """Only behind the last evaluation that was reported: before it, the run had gone on."""
    trial, stop = FakeTrial(), StopFlag()
    trial.reported = [(3, 0.5), (6, 2.0)]
    logger = PruningLogger(trial, "eval/loss", stop, reported=[3, 6])
    logger.rewrite([(step, {"eval/loss": 0.0}) for step in rows])
    assert logger.pruned is pruned
