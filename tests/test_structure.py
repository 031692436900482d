"""The shape of the package: imports go down the floors, there is one public door, and the error tree is drawn."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import steploop
from steploop import errors

PACKAGE = Path(steploop.__file__).parent

# A module may import from its own floor and from lower ones, and there are no circles. One that is not mentioned here
# fails the test.
FLOORS = [
    {"errors", "trees", "random_numbers", "checks", "interruption", "texts", "extras", "replacing"},
    {"schedules", "early_stopping", "plateau", "precision", "clip", "optim"},
    {"machine", "state", "ownership", "creation", "sharing", "traced", "tensor_stats", "shielding", "tracing"},
    {"forwarding", "differentiation", "judging", "updating", "steps", "scheduling"},
    {"evaluation", "folding", "averaging", "compilation", "checkpoint", "run_lock", "data", "logs", "batch_files",
     "layer_norms", "recipe", "capsules", "capsule_files"},
    {"benchmarking", "overrides", "recipe_files", "run", "testing", "checking", "reporting", "lr_finding", "replaying"},
    {"commands"},
    {"cli"},
]  # fmt: skip


def top_level_modules():
    return sorted(
        {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
        - {"__init__", "_recipes"}
    )


def imports():
    """(importing file, top-level module it is in, top-level module it imports)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "steploop":
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [
                    alias.name.split(".")[1] for alias in node.names if alias.name.startswith("steploop.")
                ]
            for name in names:
                yield str(path.relative_to(PACKAGE)), here, name


def test_every_module_has_a_floor():
    known = set().union(*FLOORS)
    assert [name for name in top_level_modules() if name not in known] == []
    assert sum(map(len, FLOORS)) == len(known)


def test_imports_only_go_down():
    floor = {name: n for n, names in enumerate(FLOORS) for name in names}
    homes = set(floor)
    wrong = [
        f"{path} (floor {floor[here]}) imports {name} (floor {floor[name]})"
        for path, here, name in imports()
        if here in homes and name in homes and here != name and floor[name] > floor[here]
    ]
    assert wrong == []


def test_there_are_no_circles():
    edges = {}
    for _, here, name in imports():
        if here != name:
            edges.setdefault(here, set()).add(name)
    seen, done = [], set()

    def visit(name):
        assert name not in seen, f"a circle: {' -> '.join([*seen[seen.index(name) :], name])}"
        if name in done:
            return
        seen.append(name)
        for other in sorted(edges.get(name, ())):
            visit(other)
        seen.pop()
        done.add(name)

    for name in sorted(edges):
        visit(name)


def test_the_public_namespace_is_what_all_says():
    for name in steploop.__all__:
        assert getattr(steploop, name) is not None, name
    public = {name for name in dir(steploop) if not name.startswith("_")}
    assert public == set(steploop.__all__) - {"__version__"}
    tree = ast.parse((PACKAGE / "__init__.py").read_bytes())
    typed = {
        alias.name: node.module.removeprefix("steploop.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("steploop.")
        for alias in node.names
    }
    assert typed == steploop._HOMES  # what type checkers see, and what is imported
    with pytest.raises(AttributeError, match="module 'steploop' has no attribute 'shcedule'"):
        _ = steploop.shcedule


def test_no_module_bears_the_name_of_a_public_function():
    assert set(steploop._HOMES) & set(top_level_modules()) == set()


def test_the_error_tree_is_drawn_whole():
    classes = {
        name: c
        for name, c in vars(errors).items()
        if inspect.isclass(c) and issubclass(c, errors.SteploopError)
    }
    drawn = re.findall(r"^[│ ├└─]*(\w+Error|Checkpoint\w+)\b", errors.__doc__, re.MULTILINE)
    assert sorted(drawn) == sorted(classes)
    for name, error in classes.items():
        assert error.__doc__, name
        builtins = [
            base
            for base in error.__mro__
            if base.__module__ == "builtins" and base not in {Exception, BaseException, object}
        ]
        assert builtins or error is errors.SteploopError, f"{name} subclasses no builtin error"
        line = next(line for line in errors.__doc__.splitlines() if re.search(rf"\b{name}\b", line))
        code = re.search(r"exit code (\d+)", line)
        assert code is None or int(code[1]) == error.exit_code, name


def test_nothing_pickles_or_evaluates():
    banned = re.compile(
        r"^\s*(import|from) (pickle|marshal|shelve)|torch\.load\(|(?<!\.)\b(exec|eval)\(|yaml\.", re.MULTILINE
    )
    for path in PACKAGE.rglob("*.py"):
        found = banned.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"
