"""Trees: walked in their own order, mapped without losing their kind, compared bit for bit by name."""

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import attrs
import pytest
import torch

from steploop.core.trees import (
    count_samples,
    first_difference,
    map_tensors,
    named_leaves,
    shapes,
    to_device,
    with_leaves,
)


class Pair(NamedTuple):
    left: Any
    right: Any


@attrs.frozen
class Record:
    value: Any
    _hidden: Any = 3
    made: Any = attrs.field(init=False, default=7)


ONE = torch.tensor([1.0])
TREE = {"a": ONE, "b": [ONE, 2], "c": (ONE,), "d": Pair(ONE, "x"), "e": Record(ONE)}


def test_mapping_keeps_the_kind_of_every_node_and_the_leaves_that_are_no_tensors():
    mapped = map_tensors(lambda t: t + 1, TREE)
    assert [type(node) for node in mapped.values()] == [torch.Tensor, list, tuple, Pair, Record]
    assert mapped["b"][1] == 2
    assert mapped["d"].right == "x"
    assert (mapped["e"]._hidden, mapped["e"].made) == (3, 7)
    tensors = [mapped["a"], mapped["b"][0], mapped["c"][0], mapped["d"].left, mapped["e"].value]
    assert [t.item() for t in tensors] == [2.0] * 5
    assert TREE["a"] is ONE


class Encoding(UserDict):
    """What a tokenizer gives: a mapping that holds more than its items."""

    def __init__(self, data, note):
        super().__init__(data)
        self.note = note


class Closed(OrderedDict):
    def update(self, *args):
        raise TypeError("not like this")


class Fixed(Mapping):
    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Odd(Fixed):
    def __init__(self, first, second):
        super().__init__({"first": first, "second": second})


@dataclass
class Plain:
    value: Any
    made: Any = field(init=False, default=None)
    text: str = "x"


@dataclass(frozen=True, slots=True)
class Frozen:
    value: Any
    inner: Any


def test_mapping_keeps_mappings_of_every_type_and_what_else_they_hold():
    mapped = map_tensors(lambda t: t + 1, Encoding({"ids": ONE, "n": 3}, note="said"))
    assert type(mapped) is Encoding
    assert (mapped["ids"].item(), mapped["n"], mapped.note) == (2.0, 3, "said")
    counted = map_tensors(lambda t: t + 1, defaultdict(list, {"x": ONE}))
    assert counted["new"] == []
    for kind in (OrderedDict, Closed, Fixed):
        assert type(map_tensors(lambda t: t + 1, kind({"x": ONE}))) is kind
    assert type(map_tensors(lambda t: t, MappingProxyType({"x": ONE}))) is dict
    assert map_tensors(lambda t: t + 1, Odd(ONE, 2)) == {"first": torch.tensor([2.0]), "second": 2}
    assert ONE.item() == 1.0


def test_mapping_keeps_dataclasses_whatever_their_constructor_takes():
    plain = Plain(ONE)
    plain.made = ONE * 2
    mapped = map_tensors(lambda t: t + 1, {"p": plain, "f": Frozen(ONE, [plain]), "class": Plain})
    assert type(mapped["p"]) is Plain
    assert (mapped["p"].value.item(), mapped["p"].made.item(), mapped["p"].text) == (2.0, 3.0, "x")
    assert type(mapped["f"]) is Frozen
    assert mapped["f"].inner[0].made.item() == 3.0
    assert mapped["class"] is Plain
    assert (plain.value.item(), plain.made.item()) == (1.0, 2.0)
    names = [name for name, _ in named_leaves({"f": Frozen(ONE, [plain])})]
    assert names == ["f.value", "f.inner.0.value", "f.inner.0.made", "f.inner.0.text"]
    assert count_samples(Frozen("text", {"x": torch.zeros(6)})) == 6


def test_moving_calls_the_method_to_of_objects_that_have_one():
    class Graph:
        def to(self, device):
            return f"moved to {device}"

    ragged = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device({"graph": Graph(), "x": ONE, "ragged": ragged, "n": 1}, torch.device("meta"))
    assert moved["graph"] == "moved to meta"
    assert moved["x"].device.type == moved["ragged"].data.device.type == "meta"
    assert moved["ragged"].batch_sizes.device.type == "cpu"  # as torch wants it
    assert moved["n"] == 1


def test_leaves_have_dotted_names_in_the_order_of_the_tree():
    names = [name for name, _ in named_leaves(TREE)]
    assert names == ["a", "b.0", "b.1", "c.0", "d.0", "d.1", "e.value", "e._hidden", "e.made"]
    assert [name for name, _ in named_leaves(TREE["b"], "root")] == ["root.0", "root.1"]
    assert list(named_leaves(5)) == [("", 5)]


def test_shapes_say_size_and_kind():
    batch = (torch.zeros(4, 3), {"y": torch.zeros(4, dtype=torch.int64)}, "text")
    assert shapes(batch) == "(4, 3) float32, (4,) int64"
    assert shapes(["text"]) == "no tensors"


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ([torch.zeros(5), "text"], 5),
        ((torch.zeros(5),), 5),
        ((1, torch.zeros(5)), 5),
        ((torch.zeros(()), torch.zeros(5)), 5),
        ({0: "text", 1: torch.zeros(5)}, 5),
        ({"scale": torch.zeros(()), "x": torch.zeros(5, 2), "y": torch.zeros(5)}, 5),
        ({"scale": torch.zeros(()), "x": torch.zeros(5, 2), "y": torch.zeros(7)}, None),
        ((torch.zeros(9, 5), torch.zeros(5)), None),
        ((torch.zeros(5, 2), torch.zeros(5), torch.zeros(4)), None),
        ([torch.zeros(3, 8, 6), torch.zeros(3, 8, 6), torch.zeros(3, 8, 6)], None),
        ([{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(2, 4)}], None),
        ([(torch.zeros(2, 4), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))], None),
        (([torch.zeros(3, 8), torch.zeros(3, 8)], torch.zeros(3)), None),
        ([1, torch.zeros(())], None),
        (torch.zeros(5), 5),
        (torch.zeros(()), None),
        ((), None),
        ([], None),
        (None, None),
    ],
)
def test_samples_are_counted_in_a_batch_of_any_form(batch, expected):
    assert count_samples(batch) == expected


def test_moving_a_tree_moves_its_tensors_without_waiting_unless_told_otherwise(monkeypatch):
    asked = []
    original = torch.Tensor.to

    def to(self, *arguments, **options):
        asked.append((arguments, options))
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = to_device({"x": ONE, "n": 3}, torch.device("meta"))
    to_device([ONE], torch.device("cpu"), non_blocking=False)
    assert moved["x"].device.type == "meta"
    assert moved["n"] == 3
    assert asked == [
        ((torch.device("meta"),), {"non_blocking": True}),
        ((torch.device("cpu"),), {"non_blocking": False}),
    ]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"x": ONE}, {"x": ONE.clone()}, None),
        ({"x": torch.tensor(torch.nan)}, {"x": torch.tensor(torch.nan)}, None),
        ({"x": float("nan")}, {"x": float("nan")}, None),
        ({"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": torch.tensor([1.0, 2.5, 3.25])}, "x: 2 of 3 elements differ, the largest difference is 5.000e-01"),
        ({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}, "x: 0 of 1 elements differ, the largest difference is 0.000e+00"),
        ({"x": torch.tensor([True, False, True])}, {"x": torch.tensor([True] * 3)}, "x: 1 of 3 elements differ"),
        ({"x": torch.tensor([1j, 2j, 4j])}, {"x": torch.tensor([1j, 3j, 4j])}, "x: 1 of 3 elements differ"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(3)}, "x: (2,) torch.float32 against (3,) torch.float32"),
        ({"x": torch.zeros(2)}, {"x": torch.zeros(2).double()}, "x: (2,) torch.float32 against (2,) torch.float64"),
        ({"x": ONE}, {"x": 1.0}, "x: Tensor against float"),
        ({"x": 1.0}, {"x": ONE}, "x: float against Tensor"),
        ({"x": 1}, {"x": 1.0}, "x: int against float"),
        ({"x": 1}, {"x": 2}, "x: 1 against 2"),
        ({"x": ONE, "y": 1}, {"x": ONE}, "y: only on one side"),
        ({"x": ONE}, {"z": 1, "x": ONE}, "z: only on one side"),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}, "the order of ['x', 'y']... differs"),
        ({"x": 1, "y": 1}, {"x": 1, "y": 3}, "y: 1 against 3"),
        ({"x": float("nan")}, {"x": 1.0}, "x: nan against 1.0"),
        ({"x": 1.0}, {"x": float("nan")}, "x: 1.0 against nan"),
        ({"x": torch.tensor([torch.nan, 1.0])}, {"x": torch.tensor([2.0, 1.0])}, "x: 1 of 2 elements differ, the largest difference is nan"),
        ({"x": torch.tensor([2.0, 1.0])}, {"x": torch.tensor([torch.nan, 1.0])}, "x: 1 of 2 elements differ, the largest difference is nan"),
        (dict.fromkeys("abcd", 1), dict.fromkeys("dcba", 1), "the order of ['a', 'b', 'c']... differs"),
        ({"x": torch.ones(2, requires_grad=True)}, {"x": torch.zeros(2)}, "x: 2 of 2 elements differ, the largest difference is 1.000e+00"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named_and_measured(a, b, expected):
    assert first_difference(a, b) == expected


def test_a_difference_carries_the_name_it_was_given():
    assert first_difference([1], [2], "root") == "root.0: 1 against 2"


def test_nan_in_one_place_is_a_difference_and_in_both_is_none():
    a, b = torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 2.0])
    assert first_difference(a, b).startswith(": 1 of 2 elements differ")


def test_a_tensor_that_is_not_contiguous_is_compared_by_its_values():
    a = torch.arange(6.0).reshape(2, 3).T
    assert first_difference(a, a.contiguous()) is None


def test_other_leaves_stand_where_their_paths_say():
    tree = {"a": [1, (2, 3)], "b": 4}
    assert with_leaves(tree, {("a", 1, 0): 9, ("b",): [5], ("c",): 6}) == {"a": [1, (9, 3)], "b": [5]}
    assert tree == {"a": [1, (2, 3)], "b": 4}
