"""What CONTRIBUTING.md lists is complete: a part that was added halfway is named here."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer

import steploop
from steploop import testing
from steploop.core import schedules
from steploop.core.steps.clip import unscale_and_clip
from steploop.runs.logger_options import LOGGER_OPTIONS
from steploop.runs.requests import Request
from steploop.testing import clipping_laws
from steploop.testing.strategies import curves
from steploop.tools.application import app
from steploop.tools.commands import run as command_run
from steploop.tools.report.schedule_previews import preview_schedules

PACKAGE = Path(steploop.__file__).parent
ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")

PARTS = {"check_same_metrics", "check_all_surroundings"}  # what laws are made of, and a loop over one
SCHEDULES = [name for name in schedules.__all__ if name.islower() and name != "from_torch"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_public_has_a_preview_and_a_strategy(name):
    assert getattr(steploop, name) is getattr(schedules, name)
    assert preview_schedules([name], steps=10, lr=0.1).rates[name]
    assert re.search(rf"\b{name}\b", inspect.getsource(curves)), "steploop/testing/strategies/curves.py"


def test_a_logger_can_be_opened_by_a_run():
    """Each class of a module in runs/logs that logs numbers is made in runs/outlets.py."""
    outlets = (PACKAGE / "runs" / "outlets.py").read_text(encoding="utf-8")
    for path in (PACKAGE / "runs" / "logs").glob("*.py"):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                if {"__call__", "close", "__init__"} <= methods:
                    assert re.search(rf"\b{node.name}\(", outlets), f"{path.name}: {node.name}"


def test_each_place_knows_each_option_of_a_logger():
    opened = re.findall(r"if request\.(\w+):", (PACKAGE / "runs" / "outlets.py").read_text(encoding="utf-8"))
    assert {*opened} == {*LOGGER_OPTIONS}
    for function in (Request, steploop.run, command_run.run):
        assert {*LOGGER_OPTIONS} <= {*inspect.signature(function).parameters}
    for file in ("tools/commands/run.py", "runs/from_python.py"):
        text = (PACKAGE / file).read_text(encoding="utf-8")
        assert [name for name in LOGGER_OPTIONS if f'"{name}": {name}' not in text] == [], file


def test_an_extra_that_a_message_names_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(
        re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    )
    named = {
        extra
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
        for extra in re.findall(r'extra="(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert named
    assert named <= extras


@pytest.mark.parametrize(
    "kind", [name for name in inspect.signature(unscale_and_clip).parameters if name != "state"]
)
def test_a_clipping_has_a_law(kind):
    words = kind.removeprefix("max_")
    assert [name for name in clipping_laws.__all__ if name.startswith("check_") and words in name], kind


def test_each_module_of_a_command_is_registered():
    commands = {name.replace("-", "_") for name in typer.main.get_command(app).commands}
    modules = {path.stem for path in (PACKAGE / "tools" / "commands").glob("*.py")}
    helpers = {
        name
        for name in modules
        if not re.search(
            rf"^def {name}\(", (PACKAGE / "tools" / "commands" / f"{name}.py").read_text(), re.MULTILINE
        )
    }
    assert commands >= modules - helpers


def test_each_law_is_exported_and_some_test_breaks_it():
    files = [*(ROOT / "tests").rglob("test_*.py"), *(PACKAGE / "tools" / "check").glob("*_cases.py")]
    tests = {path: path.read_text(encoding="utf-8") for path in files}
    for path in (PACKAGE / "testing").glob("*_laws.py"):
        for node in ast.parse(path.read_bytes()).body:
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.startswith("check_")
                and node.name not in PARTS
            ):
                assert node.name in testing.__all__, f"{node.name} is not exported by steploop.testing"
                users = [path for path, text in tests.items() if node.name in text]
                # of those that `steploop check` tests, test_check.py has a recipe that breaks each
                breaks = [
                    path for path in users if "AssertionError" in tests[path] or path.parent.name == "check"
                ]
                assert breaks, f"no test breaks {node.name}"


def test_each_folder_has_a_line():
    """A folder of the package, down to the second level."""
    for path in PACKAGE.glob("*/"):
        if path.name.startswith("_"):
            continue
        assert f"`{path.name}/`" in GUIDE, path.name


def test_each_file_that_is_named_exists():
    for name in re.findall(r"`((?:steploop|tests|recipes)/[\w/.]*)`", GUIDE):
        assert name == "steploop/_recipes" or (ROOT / name).exists(), name
