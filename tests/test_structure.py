"""The shape of the package: imports go down the floors, there is one public door, and the error tree is drawn."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import steploop
from steploop import errors

PACKAGE = Path(steploop.__file__).parent

# What each place may import; `errors` imports nothing. A folder that is not mentioned here fails the test.
CORE = {"errors", "core"}
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "compilation": CORE,
    "data": CORE,
    "checkpoint": CORE,
    "recipe": CORE | {"data"},
    "runs": CORE | {"compilation", "data", "checkpoint", "recipe"},
    "testing": CORE | {"data", "checkpoint"},
    "tools": CORE | {"compilation", "data", "checkpoint", "recipe", "runs", "testing"},
}  # fmt: skip


def modules():
    """Dotted name below the package -> file; the recipes that a wheel carries are not the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in {"_recipes", "__init__", "__main__"}:
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def only_for_type_checkers(tree):
    """The nodes below `if TYPE_CHECKING:` of a package's lazy door."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {id(node) for block in blocks for node in ast.walk(block)}


def imports():
    """Importing module -> modules of the package that it imports, those inside of functions too."""
    known, edges = modules(), {}
    for name, path in known.items():
        tree = ast.parse(path.read_bytes())
        skipped = only_for_type_checkers(tree) if path.name == "__init__.py" else set()
        for node in ast.walk(tree):
            targets = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "steploop":
                here = node.module.removeprefix("steploop").removeprefix(".")
                for alias in node.names:
                    below = f"{here}.{alias.name}".removeprefix(".")
                    targets.append(below if below in known else here)
            elif isinstance(node, ast.Import):
                targets = [
                    a.name.removeprefix("steploop.") for a in node.names if a.name.startswith("steploop.")
                ]
            if id(node) not in skipped:
                edges.setdefault(name, set()).update(t for t in targets if t in known)
    return edges


def test_the_package_has_at_most_ten_places_and_each_is_known():
    places = {path.stem for path in PACKAGE.iterdir() if path.suffix in {"", ".py"}}
    places -= {"__init__", "__main__", "__pycache__", "_recipes", "py"}
    assert places - {"docs"} == set(MAY_IMPORT)
    assert len(places) <= 10


def test_a_place_imports_only_what_it_may():
    wrong = [
        f"{here} imports {target}"
        for here, targets in imports().items()
        for target in sorted(targets)
        if (there := target.split(".")[0]) != (place := here.split(".")[0]) and there not in MAY_IMPORT[place]
    ]
    assert wrong == []


def test_there_are_no_circles_between_modules():
    edges = imports()
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


def private_names():
    """Underscored name -> the files whose classes define it."""
    found = {}
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                for part in ast.walk(node):
                    stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                    name = part.attr if stored else getattr(part, "name", None)
                    if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        name = part.target.id
                    if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                        found.setdefault(name, set()).add(path)
    return found


def test_no_module_reads_what_is_private_to_another_one():
    """Outside of core/state; an exception has its reason on the line. What is private to torch is not looked at."""
    own, foreign = private_names(), []
    for name, path in modules().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Attribute) or path in own.get(node.attr, {path}):
                continue
            by_itself = isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", "torch", "np"}
            if not by_itself and not name.startswith("core.state") and "#" not in lines[node.lineno - 1]:
                foreign.append(f"{name}, line {node.lineno}: {node.attr}")
    assert foreign == []


def test_no_two_modules_have_one_name():
    names = [path.stem for path in modules().values() if path.name != "__init__.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_public_namespace_is_what_all_says():
    for name in steploop.__all__:
        assert getattr(steploop, name) is not None, name
    public = {name for name in dir(steploop) if not name.startswith("_")}
    assert public == set(steploop.__all__) - {"__version__"}
    assert set(steploop._HOMES) == public | {"compile"}  # which `import *` must not put over the built-in
    tree = ast.parse((PACKAGE / "__init__.py").read_bytes())
    typed = {
        alias.name: node.module.removeprefix("steploop.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module.startswith("steploop.")
        and "lazy" not in node.module
        if "moved_names" not in node.module
        for alias in node.names
    }
    assert typed == steploop._HOMES  # what type checkers see, and what is imported
    with pytest.raises(AttributeError, match="module 'steploop' has no attribute 'shcedule'"):
        _ = steploop.shcedule


def test_no_module_bears_the_name_of_a_public_function():
    assert set(steploop._HOMES) & set(MAY_IMPORT) == set()


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
