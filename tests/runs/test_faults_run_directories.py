"""Run directories of strangers: each command that reads one ends in time, in plain text, within the directory.

A door that forgets a check is seen here: a link that is followed, a pipe that is waited for, a value that is trusted.
"""

import json
import random
import re
import shutil
import signal
import unicodedata
from contextlib import contextmanager

import pytest
import typer
from hostile_runs import SECRET, Mutator, make_base, make_outside
from sample_runs import make_run

from steploop.tools import application, cli

LIMIT_S = 120  # of one command: a hang is meant, on a machine however busy; the slowest takes seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _one_parser(monkeypatch):
    """The command line puts its parser together at each start, which takes longer than most commands here."""
    monkeypatch.setattr(application, "app", typer.main.get_command(application.app))


@contextmanager
def within(seconds):
    """An alarm ends a command that hangs."""

    def late(*_):
        raise AssertionError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def steering(text):
    """Characters that steer a terminal."""
    return {c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}} - {"\n"}


class Commands:
    """Runs commands and checks what holds for each of them, whatever the directory is."""

    def __init__(self, capsys, outside):
        self.capsys, self.outside = capsys, outside
        self.before = self._outside()

    def _outside(self):
        return {p: p.read_bytes() for p in self.outside.rglob("*") if p.is_file()}

    def __call__(self, *words, allowed=(0, 1, 2, 3)):
        with within(LIMIT_S):
            code = cli.call([str(word) for word in words])
        out, err = self.capsys.readouterr()
        assert code in allowed, (code, err)
        assert code == 0 or words[0] == "diff" or err.startswith(("steploop: ", "Usage: ")), err
        assert "Traceback" not in out + err
        assert not steering(out + err), out + err
        assert SECRET not in out + err
        assert self._outside() == self.before
        return code, out


def table_and_status(run, good, page, commands):
    code, table = commands("runs", run.parent, allowed=(0,))
    assert re.search(r"/good +two_moons .* finished *$", table, re.MULTILINE), table
    listed = json.loads(commands("runs", run.parent, "--json", allowed=(0,))[1])
    code, text = commands("status", run, "--json")
    if code == 0:  # the two agree on how a run stands
        assert json.loads(text)["state"] == {one["run"]: one["state"] for one in listed}[str(run)]
    commands("status", run)


def report_elsewhere(run, good, page, commands):
    if commands("report", run, good, "--out", page)[0] == 0:
        assert SECRET not in page.read_text(encoding="utf-8")


def report_in_the_run(run, good, page, commands):
    if commands("report", run)[0] == 0:
        assert not (run / "report.html").is_symlink()
        assert SECRET not in (run / "report.html").read_text(encoding="utf-8")


def plot_in_the_terminal(run, good, page, commands):
    commands("plot", run, good, "--terminal")


def inspect_and_diff(run, good, page, commands):
    commands("inspect", run)
    commands("inspect", run, "--json")
    commands("diff", run, run.parent.parent / "base")


def replay(run, good, page, commands):
    for number, capsule in enumerate(sorted((run / "capsules").glob("*"))[:2]):
        commands("replay", capsule, *(["--json"] if number else []))


def plot_files(run, good, page, commands):
    commands("plot", run)


CHECKS = (
    table_and_status,
    report_elsewhere,
    report_in_the_run,
    plot_in_the_terminal,
    inspect_and_diff,
    replay,
)


def fuzz(count, seed, base, folder, capsys, *, each=6, plots=0.01):
    """Check ``count`` mutants by ``each`` of the checks, and a share ``plots`` of them by slow matplotlib too."""
    outside = make_outside(folder / "outside")
    rng = random.Random(seed)
    mutator, commands = Mutator(base, rng, outside), Commands(capsys, outside)
    runs = folder / "runs"
    shutil.copytree(base, folder / "base")
    good = make_run(runs / "good", steps=40, epochs=2)
    for number in range(count):
        run = runs / "bad"
        done = mutator.make(run)
        chosen = rng.sample(CHECKS, each) + [plot_files] * (rng.random() < plots)
        try:
            for one in chosen:
                one(run, good, folder / "page.html", commands)
        except BaseException as error:
            error.add_note(f"mutant {number} of seed {seed}: {done}; it is kept in {run}")
            raise
        shutil.rmtree(run)


def test_three_hundred_damaged_run_directories_end_in_plain_text_in_time(base, tmp_path, capsys):
    """No traceback, no hang, nothing from outside of the directory, and the good run beside it is always listed."""
    fuzz(300, 0, base, tmp_path, capsys, each=2, plots=0.003)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_run_directories_end_in_plain_text_in_time(seed, base, tmp_path, capsys):
    fuzz(1000, seed, base, tmp_path, capsys)
