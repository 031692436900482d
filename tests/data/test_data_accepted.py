"""What a Loader takes as a dataset, and what it refuses: by name, before the first batch, with what to do."""

import subprocess
import sys
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from steploop.data import Loader, Stream
from steploop.errors import DataError

N = 12
X = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
Y = np.arange(N)
TX, TY = torch.from_numpy(X), torch.from_numpy(Y)
Pair = namedtuple("Pair", ["x", "y"])  # noqa: PYI024


@dataclass
class Record:
    x: Any
    y: Any


@attrs.frozen
class Frozen:
    x: Any
    y: Any


class Squares(Dataset):
    """Has fields and an index: the index counts."""

    def __init__(self):
        self.x = TX

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i], i


@dataclass
class SquaresAsDataclass:
    x: Any

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.x[i], i


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def rows_of(data, **options):
    """The batches of a Loader in the order of the data, with an oracle's view: lists of y by batch."""
    loader = Loader(data, batch_size=5, seed=0, shuffle=False, **options)
    assert loader.num_samples == N
    assert len(loader) == 3
    return list(loader)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ((X, Y), tuple),
        ((TX, Y), tuple),
        ([(x, y) for x, y in zip(X, Y, strict=True)], list),
        (deque(zip(TX, TY, strict=True)), list),
        (Pair(X, Y), Pair),
        (TensorDataset(TX, TY), tuple),
        (Squares(), list),
        (SquaresAsDataclass(TX), list),
    ],
    ids=lambda v: getattr(type(v), "__name__", str(v)),
)
def test_inputs_and_targets_stay_pairs(data, parts):
    batches = rows_of(data)
    assert all(type(batch) is parts for batch in batches)
    assert torch.equal(torch.cat([b[0] for b in batches]), TX)
    assert torch.equal(torch.cat([b[1] for b in batches]), TY)


@pytest.mark.parametrize(
    "data",
    [
        {"x": X, "y": Y},
        OrderedDict(x=TX, y=Y),
        UserDict({"x": X, "y": TY}),
        Record(X, Y),
        Frozen(X, TY),
        [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    ],
    ids=lambda v: type(v).__name__,
)
def test_named_columns_stay_named_and_their_container_what_it_is(data):
    batches = rows_of(data)
    kind = dict if isinstance(data, list) else type(data)
    assert all(type(batch) is kind for batch in batches)
    get = (lambda b, k: b[k]) if hasattr(batches[0], "keys") else getattr
    assert torch.equal(torch.cat([get(b, "x") for b in batches]), TX)
    assert torch.equal(torch.cat([get(b, "y") for b in batches]), TY)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", [lambda x, y: UserDict(x=x, y=y), OrderedDict, Record, Frozen, Pair])
def test_a_batch_of_any_kind_stays_what_it_is_on_its_way_to_a_device(form, device):
    """What collate makes is a user's own: a tokenizer's mapping, a dataclass of a detector."""
    make = (lambda x, y: OrderedDict(x=x, y=y)) if form is OrderedDict else form

    def collate(samples):
        return make(torch.stack([torch.from_numpy(x) for x, _ in samples]), [y for _, y in samples])

    for batch in rows_of(list(zip(X, Y.tolist(), strict=True)), collate=collate, device=device):
        assert type(batch) is type(make(0, 0))
        x, y = (batch["x"], batch["y"]) if hasattr(batch, "keys") else (batch.x, batch.y)
        assert x.device.type == device
        assert all(type(label) is int for label in y)


def test_columns_may_be_nested():
    batches = rows_of(((X, {"more": X * 2}), Y))
    (x, named), y = batches[1]
    assert torch.equal(x * 2, named["more"])
    assert y.tolist() == [5, 6, 7, 8, 9]


@given(
    dtype=st.sampled_from(["float16", "float32", "float64", "int8", "uint8", "uint16", "int64", "bool", ">f4", ">i2", "complex64"]),
    form=st.sampled_from(["plain", "reversed", "every second", "read-only", "transposed"]),
)  # fmt: skip
def test_an_array_of_any_layout_gives_its_own_rows_and_keeps_its_dtype(dtype, form):
    array = (np.arange(48).reshape(12, 4) % 2 + np.arange(12)[:, None]).astype(dtype)
    array = {
        "plain": lambda a: a,
        "reversed": lambda a: a[::-1],
        "every second": lambda a: a[::2],
        "read-only": lambda a: a.copy(),
        "transposed": lambda a: a.T,
    }[form](array)
    if form == "read-only":
        array.flags.writeable = False
    got = torch.cat(list(Loader(array, batch_size=5, seed=0, shuffle=False))).numpy()
    assert got.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(got, array)


def test_an_array_is_not_copied():
    array = np.zeros((4, 2), np.float32)
    assert Loader(array, batch_size=2, seed=0).dataset.data_ptr() == array.ctypes.data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([TX, TY], r"a list of 2 Tensors, which may be samples or columns\. For columns give a tuple"),
        ([X, Y], "a list of 2 ndarrays, which may be samples or columns"),
        ([X.tolist(), Y.tolist()], "a list of 2 lists, which may be samples or columns"),
        ((X.tolist(), Y), r"the dataset\[0\] is a list\. .*convert it \(torch\.tensor"),
        ({"x": X, "y": list(Y)}, r"the dataset\['y'\] is a list"),
        ((X, Y[:-1]), r"common first axis, the samples; their shapes are 0: \(12, 3\), 1: \(11,\)"),
        ({"x": X, "n": np.float32(3)}, r"the dataset\['n'\] is a float32"),
        (np.array(3.0), "common first axis"),
        (np.array(["a", "b"]), r"the dataset holds no numbers that torch knows, but <U1"),
        ((X, np.array([None] * N)), r"the dataset\[1\] holds no numbers that torch knows, but object"),
        (np.array(["2020-01-01"], "M8[D]"), "holds no numbers that torch knows, but datetime64"),
        (np.zeros(3, [("a", "f4")]), "holds no numbers that torch knows"),
        (np.ma.masked_array(X, X > 3), r"is a masked array, and a tensor has no mask"),
        ((), "the dataset is a tuple. A Loader takes"),
        ({}, "the dataset is a dict. A Loader takes"),
        (None, "the dataset is a NoneType. A Loader takes"),
        ({1, 2}, "the dataset is a set. A Loader takes"),
        ("train.csv", "the dataset is a str. Read the file first"),
        (Path("train.csv"), "is a PosixPath. Read the file first"),
        (b"abc", "the dataset is a bytes. Read the file first"),
        (zip(X, Y, strict=True), "is a zip. It has no samples by index.*Stream"),
        ((i for i in range(3)), "is a generator. It has no samples by index.*Stream"),
        (Endless(), "is a Endless. It has no samples by index.*Stream"),
        (DataLoader(TensorDataset(TX)), "is a DataLoader. It makes batches already: give it to the Recipe"),
        (Loader((X, Y), batch_size=2, seed=0), "is a Loader. It makes batches already"),
        (Stream(lambda _epoch, _start: []), "is a Stream. It makes batches already"),
        ({"train": Squares(), "test": Squares()}, r"the dataset\['train'\] is a Squares.*choose one"),
        (torch.zeros(3, 3).to_sparse(), r"layout torch.sparse_coo.*to_dense"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "from which no batch can be cut"),
    ],
    ids=range(29),
)  # fmt: skip
def test_what_is_no_dataset_is_refused_in_words(data, message):
    with pytest.raises(DataError, match=message):
        Loader(data, batch_size=4, seed=0)


def test_a_list_of_arrays_is_samples_where_collate_says_so():
    ragged = [torch.ones(n) for n in range(1, N + 1)]
    batches = rows_of(
        ragged, collate=lambda samples: torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    )
    assert [tuple(b.shape) for b in batches] == [(5, 5), (5, 10), (2, 12)]


def test_a_frame_is_a_dict_of_columns_by_position_with_its_dtypes():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": X[:, 0], "b": Y, "c": Y % 2 == 0}, index=np.arange(N)[::-1] + 100)
    frame["d"] = pd.array(Y, dtype="Int64")
    batch = rows_of(frame)[1]
    assert {k: (t.dtype, t.tolist()[0]) for k, t in batch.items()} == {
        "a": (torch.float32, 15.0), "b": (torch.int64, 5), "c": (torch.bool, False), "d": (torch.int64, 5),
    }  # fmt: skip
    features, target = rows_of((frame[["a", "b"]], frame["b"]))[2]
    assert (list(features), target.tolist()) == (["a", "b"], [10, 11])
    assert rows_of(frame["b"])[0].tolist() == [0, 1, 2, 3, 4]


def test_a_frame_with_text_gaps_dates_or_twice_a_name_is_refused_by_column():
    pd = pytest.importorskip("pandas")
    bad = {
        r"\['t'\] \(dtype (str|object|string)\) holds no numbers": pd.DataFrame({"x": Y, "t": ["a"] * N}),
        r"\['g'\] lacks 1 of its values": pd.DataFrame({"g": pd.array([1, None], dtype="Int64")}),
        r"\['n'\] lacks 2 of its values.*NumPy arrays": pd.DataFrame({"n": [1.0, None, float("nan")]}),
        r"\['d'\] \(dtype datetime": pd.DataFrame({"d": pd.to_datetime(["2020-01-01"])}),
        r"\['k'\] \(dtype category\)": pd.DataFrame({"k": pd.Categorical(["u", "v"])}),
        r"different names, got \['x', 'x'\]": pd.DataFrame(X[:, :2], columns=["x", "x"]),
        r"different names, got \[\]": pd.DataFrame(index=range(3)),
    }
    for message, frame in bad.items():
        with pytest.raises(DataError, match=message):
            Loader(frame, batch_size=2, seed=0)
    meant = Loader({"n": np.array([1.0, np.nan])}, batch_size=2, seed=0, shuffle=False)
    assert str(next(iter(meant.epoch(0)))["n"].tolist()) == "[1.0, nan]"


def test_an_arrow_table_is_a_dict_of_columns_without_gaps():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"x": X[:, 0], "y": Y})
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    for data in (table, chunked, table.to_batches()[0]):
        assert [b["y"].tolist() for b in rows_of(data)][2] == [10, 11]
    with pytest.raises(DataError, match=r"\['y'\] lacks 1 of its values"):
        Loader(pa.table({"y": [1, None]}), batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"\['t'\] \(Arrow's string\) holds no numbers"):
        Loader(pa.table({"t": ["a", "b"]}), batch_size=2, seed=0)


def test_a_hugging_face_dataset_gives_tensors_and_no_transposed_lists():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"ids": X.astype(int).tolist(), "label": Y.tolist(), "text": ["t"] * N})
    batch = rows_of(data)[1]
    assert batch["ids"].tolist() == X.astype(int)[5:10].tolist()
    assert (batch["label"].tolist(), batch["text"]) == ([5, 6, 7, 8, 9], ["t"] * 5)
    assert rows_of(data.with_format("numpy"))[2]["label"].tolist() == [10, 11]
    assert rows_of(data, collate=list)[2][1]["ids"] == [33, 34, 35]  # as the dataset gives them
    with pytest.raises(DataError, match=r"the dataset\['train'\] is a Dataset.*choose one"):
        Loader(datasets.DatasetDict(train=data), batch_size=2, seed=0)
    with pytest.raises(DataError, match=r"is a IterableDataset\. It has no samples by index"):
        Loader(data.to_iterable_dataset(), batch_size=2, seed=0)


def test_no_table_library_is_imported_by_a_loader():
    code = (
        "import sys, numpy as np; from steploop.data import Loader\n"
        "list(Loader((np.zeros((4, 2)), np.zeros(4)), batch_size=2, seed=0))\n"
        "print(sorted({'pandas', 'pyarrow', 'datasets', 'scipy', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
