"""Recipe files and overrides of their Config: found, loaded, checked, converted; and what is refused says why."""

import enum
import json
import string
import sys
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.errors import ConfigError, MissingExtraError
from steploop.recipe.config_values import (
    configure,
    convert,
    describe_type,
    nearest,
    refuse_unrecordable,
    settled_paths,
    split_assignments,
    to_json,
)
from steploop.recipe.recipe_files import load_recipe_file
from steploop.recipe.recipe_paths import find_recipe, shipped_recipes, summary_of

GOOD = '"""What it shows.\n\nMore."""\nimport attrs\n@attrs.frozen\nclass Config:\n    epochs: int = 1\ndef build(config, device): ...\n'


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@attrs.frozen(kw_only=True)
class Config:
    rate: float = 0.1
    count: int = 3
    flag: bool = False
    name: str = "x"
    root: Path = Path()
    choice: Literal["auto", "cpu"] = "auto"
    number: Literal[1, 2] = 1
    maybe: int | None = None
    widths: tuple[int, ...] = (1, 2)
    betas: tuple[float, float] = (0.9, 0.999)
    names: list[str] = attrs.Factory(list)
    colour: Colour = Colour.RED
    either: int | float = 0
    anything: Any = None
    checked: int = attrs.field(default=1, validator=attrs.validators.ge(0))


words = st.text(string.ascii_letters + "é ✓=", max_size=8)
configs = st.builds(
    Config,
    rate=st.floats(allow_nan=False),
    count=st.integers(),
    flag=st.booleans(),
    name=words,
    root=words.map(Path),
    choice=st.sampled_from(["auto", "cpu"]),
    number=st.sampled_from([1, 2]),
    maybe=st.none() | st.integers(),
    widths=st.lists(st.integers(), max_size=4).map(tuple),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    names=st.lists(words, max_size=3),
    colour=st.sampled_from(Colour),
    checked=st.integers(0),
)


@given(configs)
def test_a_config_comes_back_from_its_json(config):
    assert configure(Config, json.loads(json.dumps(to_json(config)))) == config


@given(configs)
def test_a_config_comes_back_from_the_command_line(config):
    """Every field but lists of words, in which a comma or a blank cannot be told from the list's own."""
    given_ = {}
    for name, value in to_json(config).items():
        if name not in {"anything", "names"}:
            given_[name] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    again = configure(Config, split_assignments([f"{name}={value}" for name, value in given_.items()]))
    assert attrs.evolve(again, names=config.names) == config


@pytest.mark.parametrize(
    ("field", "text", "expected"),
    [
        ("rate", "fast", "float"), ("rate", "nan", "float"), ("rate", True, "float"),
        ("count", "1.0", "int"), ("count", "", "int"), ("count", 1.0, "int"), ("count", True, "int"),
        ("flag", "2", "bool"), ("flag", 1, "bool"), ("name", 3, "str"),
        ("choice", "cup", "one of auto, cpu, but got 'cup'; its default is auto. Did you mean cpu?"),
        ("number", "3", "one of 1, 2"), ("maybe", "x", "int or none"), ("widths", "1,x", "int,int,..."),
        ("betas", "0.9", "float,float,..."), ("colour", "GREEN", "one of RED, BLUE"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_the_type_expected(field, text, expected):
    with pytest.raises(ConfigError) as caught:
        configure(Config, {field: text}, where="mine")
    assert f"mine: {field} must be {expected}" in str(caught.value)
    assert repr(text) in str(caught.value)


def test_a_name_that_is_no_field_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^mine has no setting 'cuont'\. Did you mean count\?$"):
        configure(Config, {"cuont": 1}, where="mine")
    assert nearest("zzz", ["a", "b"]) == "There are: a, b."


def test_a_value_that_the_config_itself_refuses_is_a_config_error():
    with pytest.raises(ConfigError, match="mine: 'checked' must be >= 0: -1"):
        configure(Config, {"checked": "-1"}, where="mine")


def test_assignments_need_a_name_and_come_once():
    assert split_assignments(["a=b=c", "d ="]) == {"a": "b=c", "d": ""}
    for wrong in (["a"], ["=1"]):
        with pytest.raises(ConfigError, match="--set takes name=value"):
            split_assignments(wrong)
    with pytest.raises(ConfigError, match="--set a is given twice, as '1' and as '2'"):
        split_assignments(["a=1", "a=2"])


def test_a_type_that_text_cannot_give_is_refused():
    with pytest.raises(ValueError):
        convert("x", dict[str, int])
    assert describe_type(dict) == "dict"


def test_a_recipe_is_found_by_path_or_by_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    assert find_recipe(str(path)) == path
    assert find_recipe("cifar_amp") == shipped_recipes()["cifar_amp"]
    with pytest.raises(ConfigError, match=r"There is no recipe 'cifar_apm'.*Did you mean cifar_amp\?"):
        find_recipe("cifar_apm")
    with pytest.raises(ConfigError, match=f"{tmp_path} is a directory. Give the recipe's file, or --resume"):
        find_recipe(str(tmp_path))


def test_a_recipe_is_loaded_as_it_is_now_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    first = load_recipe_file(path)
    assert first.config_class().epochs == 1
    assert summary_of(path) == "What it shows."
    path.write_text(GOOD.replace("= 1", "= 2"))  # of the same size, within the same second
    second = load_recipe_file(path)
    assert second.config_class().epochs == 2
    assert (first.sha256 != second.sha256, first.name) == (True, "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


def test_a_recipe_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_it.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text(
        GOOD.replace("import attrs", "import attrs\nfrom beside_it import VALUE").replace("= 1", "= VALUE")
    )
    assert load_recipe_file(tmp_path / "mine.py").config_class().epochs == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def build(config, device): ...", "needs a class Config made with @attrs.frozen"),
        ("class Config: ...\ndef build(config, device): ...", "needs a class Config made with @attrs.frozen"),
        (GOOD.replace(" = 1", ""), "every field of Config needs a default, but epochs has none."),
        (GOOD.replace("def build", "def biuld"), r"needs a function build\(config, device\)"),
        (
            "import attrs\nimport nonsense_that_is_not_there",
            r"cannot be loaded: ModuleNotFoundError: .* \(line 2\)",
        ),
        ("x = (", r"cannot be loaded: SyntaxError: .*line 1"),
    ],
)
def test_a_recipe_that_lacks_something_is_refused(source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_recipe_file(tmp_path / "mine.py")


def test_the_shipped_recipes_are_whole():
    for name, path in shipped_recipes().items():
        recipe = load_recipe_file(path)
        config = recipe.config_class()
        assert {"epochs", "seed"} <= set(to_json(config)), name
        assert configure(recipe.config_class, to_json(config)) == config
        assert 10 < len(summary_of(path)) <= 120, name
        assert "MEASURED" not in path.read_text(), f"{name} does not say what was measured"


@attrs.frozen
class Part:
    widths: tuple[int, ...] = (1,)
    scale: float = 1.0


@attrs.frozen(kw_only=True)
class Nested:
    weights: dict[str, float] = attrs.Factory(dict)
    by_depth: dict[int, tuple[int, ...]] = attrs.Factory(dict)
    bound: float = float("inf")
    sizes: list = attrs.Factory(list)
    chosen: frozenset[str] = frozenset()
    part: Part = Part()
    parts: tuple[Part, ...] = ()
    maybe: Part | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (a value)
    colours: tuple[Colour, ...] = ()


parts = st.builds(
    Part, widths=st.lists(st.integers(), max_size=2).map(tuple), scale=st.floats(allow_nan=False)
)


@given(
    st.builds(
        Nested,
        weights=st.dictionaries(words, st.floats(allow_nan=False), max_size=2),
        by_depth=st.dictionaries(st.integers(), st.lists(st.integers(), max_size=2).map(tuple), max_size=2),
        bound=st.sampled_from([float("inf"), -float("inf"), 0.5]),
        sizes=st.lists(st.integers() | words | st.booleans(), max_size=3),
        chosen=st.frozensets(words, max_size=3),
        part=parts,
        parts=st.lists(parts, max_size=2).map(tuple),
        maybe=st.none() | parts,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        device=st.sampled_from(["cpu", "cuda:1"]).map(torch.device),
        colours=st.lists(st.sampled_from(Colour), max_size=2).map(tuple),
    )
)
def test_mappings_nested_classes_infinities_and_dtypes_survive_a_resume(config):
    refuse_unrecordable(config, where="mine")
    assert configure(Nested, json.loads(json.dumps(to_json(config), allow_nan=False))) == config


@pytest.mark.parametrize(
    "field",
    [
        "anything: object = (1, 2)", "sizes: list = [(1, 2)]", "rate: float = float('nan')", "call: object = print",
        "data: dict = {'a': float('inf')}", "name: str | None = 'none'", "name: str = '\\udcff'", "counts: dict = {1: 2}", "either: str | float = float('inf')",
    ],
)  # fmt: skip
def test_a_config_that_a_resume_would_read_otherwise_is_refused_by_name(field, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD.replace("epochs: int = 1", f"epochs: int = 1\n    {field}"))
    config = load_recipe_file(tmp_path / "mine.py").config_class()
    with pytest.raises(
        ConfigError, match=f"^mine: {field.partition(':')[0]}=.* cannot be written to config.json"
    ):
        refuse_unrecordable(config, where="mine")


def test_json_on_the_command_line_gives_mappings_and_nested_classes():
    values = {"weights": '{"a": 2}', "part": '{"scale": 3}', "sizes": "1,a", "dtype": "torch.bfloat16"}
    config = configure(Nested, values)
    assert (config.weights, config.part, config.sizes) == ({"a": 2.0}, Part(scale=3.0), [1, "a"])
    assert config.dtype is torch.bfloat16
    for wrong in ({"weights": "a=2"}, {"part": '{"scael": 3}'}, {"dtype": "nn"}):
        with pytest.raises(ConfigError, match=f"mine: {next(iter(wrong))} must be"):
            configure(Nested, wrong, where="mine")


def test_relative_paths_of_a_config_are_settled_once(tmp_path, monkeypatch):
    @attrs.frozen
    class Places:
        root: str | None = None
        other: Path = Path("here")
        name: str = "root"

    monkeypatch.chdir(tmp_path)
    assert settled_paths(Places(), ["root", "other"]) == Places(None, tmp_path / "here", "root")
    assert settled_paths(Places("data"), ["root"]).root == str(tmp_path / "data")
    assert settled_paths(Places("s3://data"), ["root"]).root == "s3://data"
    assert settled_paths(Places(""), ["root"]).root == ""  # no folder, not the one that the run begins in


def test_a_shipped_recipe_whose_packages_are_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    message = r"The recipe resnet_transfer needs torchvision.models, .* pip install 'steploop\[recipes\]'"
    with pytest.raises(MissingExtraError, match=message):
        load_recipe_file(find_recipe("resnet_transfer"))
