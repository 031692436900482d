"""Every public name has a docstring with an example, and the example shows what it shows."""

import doctest
import importlib
import inspect
import random
import re

import pytest
import torch

import steploop
from steploop.tools.commands.docs import read_pages

MODULES = ("steploop", "steploop.data", "steploop.recipe", "steploop.checkpoint", "steploop.testing")


def public_names():
    """(name, object) of all that can carry a docstring: constants and aliases of types cannot."""
    for name in MODULES:
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
        for key in [*listed, *(["compile"] if name == "steploop" else [])]:
            value = getattr(module, key)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield pytest.param(value, id=f"{name}.{key}")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the page says that the examples begin with."""
    monkeypatch.chdir(tmp_path)
    program = re.search(r"```python\n(.*?)```", read_pages()["api"], re.DOTALL)[1]
    namespace, python = {"__name__": "example"}, random.getstate()
    with torch.random.fork_rng():
        exec(compile(program, "api.md", "exec"), namespace)
        namespace["folder"] = tmp_path
        yield namespace
    random.setstate(python)


@pytest.mark.parametrize("value", list(public_names()))
def test_a_public_name_has_an_example_that_runs(value, names):
    assert value.__doc__, "no docstring"
    examples = doctest.DocTestParser().get_doctest(
        inspect.getdoc(value), names, value.__name__, inspect.getsourcefile(value), None
    )
    runs = [example for example in examples.examples if not example.options.get(doctest.SKIP)]
    assert runs or value is steploop.compile, "no example that runs"  # a compiler is slow; its tests run it
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(examples, out=said.append).failed == 0, "".join(said)
