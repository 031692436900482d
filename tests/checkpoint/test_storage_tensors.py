"""Tensors and names in safetensors files: the zoo, names, equal bytes, and what is refused."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import MemoryFs, bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steploop.checkpoint.format import tensor_files as tensors_module
from steploop.checkpoint.format.layout import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorSpec,
    header_bytes,
    spec_from_json,
    spec_of,
)
from steploop.checkpoint.format.tensor_files import FileRecord, hash_tensors, read_tensors, write_tensors
from steploop.checkpoint.storage.local import LOCAL
from steploop.errors import CheckpointDamagedError, CheckpointUnsupportedError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EIGHT = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
INTS = [
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
]
DTYPES = [*FLOATS, *EIGHT, *INTS, torch.bool, torch.complex64, torch.complex128]


def write(path, tensors, metadata="{}"):
    specs = {name: spec_of(name, t) for name, t in tensors.items()}
    file = LOCAL.create(path)
    record = write_tensors(file, tensors, specs, metadata)
    file.close()
    return record, specs


def read(path, record, specs, metadata="{}"):
    file = LOCAL.open(path.parent, path.name)
    try:
        return read_tensors(file, str(path), record, specs, metadata)
    finally:
        file.close()


def round_trip(path, tensors):
    record, specs = write(path, tensors)
    return read(path, record, specs)


def random_bits(dtype, shape):
    """Any bit pattern at all, NaN payloads included."""
    width = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(
        0, high, (*shape, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    return raw.view(dtype).reshape(shape) if dtype != torch.bool else raw.reshape(shape).bool()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 5), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_comes_back_to_the_bit(tmp_path, dtype, shape):
    tensor = random_bits(dtype, shape)
    back = round_trip(tmp_path / "f", {"x": tensor})["x"]
    assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert bits(back) == bits(tensor)


ZOO = {
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels_last": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last with one channel": torch.arange(40.0)
    .reshape(2, 1, 4, 5)
    .to(memory_format=torch.channels_last),
    "channels_last_3d": torch.arange(240.0).reshape(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "complex128, transposed": torch.arange(6, dtype=torch.float64).reshape(2, 3).mul(1 + 2j).t(),
    "parameter": torch.nn.Parameter(torch.arange(4.0)),
    "offset into a storage": torch.arange(10.0)[3:7],
}
LOOSE = {
    "slice with gaps": torch.arange(12.0).reshape(3, 4)[:, ::2],
    "slice of channels_last": torch.arange(120.0)
    .reshape(2, 3, 4, 5)
    .to(memory_format=torch.channels_last)[:, :2],
    "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "expanded scalar": torch.ones(()).expand(2, 2),
    "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "conj of complex128": torch.tensor([1 + 2j], dtype=torch.complex128).conj(),
    "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "requires grad and has a graph": torch.ones(3, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", ZOO)
def test_dense_layouts_come_back_with_their_strides(tmp_path, kind):
    tensor = ZOO[kind].detach()
    back = round_trip(tmp_path / "f", {"x": tensor})["x"]
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()
    for layout in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if layout is torch.contiguous_format or tensor.dim() == {torch.channels_last: 4}.get(layout, 5):
            assert back.is_contiguous(memory_format=layout) == tensor.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", LOOSE)
def test_views_with_gaps_overlaps_or_lazy_signs_come_back_as_their_clone(tmp_path, kind):
    tensor = LOOSE[kind].detach()
    back = round_trip(tmp_path / "f", {"x": tensor})["x"]
    clone = tensor.clone().resolve_conj().resolve_neg()
    assert bits(back) == bits(clone)
    assert back.stride() == clone.stride()
    assert not back.is_conj()
    assert not back.is_neg()


class Subclass(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def unsupported():
    return {
        "meta": (torch.empty(2, device="meta"), "on the meta device: it has no values"),
        "sparse": (torch.eye(2).to_sparse(), "a tensor of layout torch.sparse_coo"),
        "complex32": (torch.empty(2, dtype=torch.int32).view(torch.bits16), "of dtype torch.bits16"),
        "float4": (torch.empty(2, dtype=torch.float4_e2m1fn_x2), "of dtype torch.float4_e2m1fn_x2"),
        "17 axes": (torch.ones([1] * 17), "of 17 axes"),
        "subclass": (torch.Tensor._make_subclass(Subclass, torch.ones(2)), "a Subclass"),
    }


@pytest.mark.parametrize("kind", unsupported())
def test_what_no_file_can_hold_is_refused_by_name(kind):
    tensor, said = unsupported()[kind]
    with pytest.raises(CheckpointUnsupportedError) as e:
        spec_of("encoder.weight", tensor)
    assert f"'encoder.weight' is {said}, which a checkpoint cannot hold." in str(e.value)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", 3, None], ids=repr)
def test_names_that_safetensors_cannot_hold_are_refused(name):
    with pytest.raises(
        CheckpointUnsupportedError, match="safetensors needs names that are text in UTF-8 other than"
    ):
        spec_of(name, torch.ones(1))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), unique=True, max_size=6))
def test_every_name_comes_back_here_and_in_safetensors(names):
    """Unicode, dots, the empty name, NUL, newlines, quotes."""
    tensors = {name: torch.full((i,), float(i)) for i, name in enumerate(names) if name != "__metadata__"}
    specs = {name: spec_of(name, t) for name, t in tensors.items()}
    fs = MemoryFs({"/d": {}})
    file = fs.create(Path("/d/f"))
    record = write_tensors(file, tensors, specs, "é\n")
    back = read_tensors(fs.open(Path("/d"), "f"), "f", record, specs, "é\n")
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    header = fs.contents[0][8 : 8 + int.from_bytes(fs.contents[0][:8], "little")]
    assert set(json.loads(header)) == {*tensors, "__metadata__"}


@pytest.mark.parametrize(
    "name",
    ["", ".", "a" * 10_000, "é ✓ 𝄞", "a\n\x00\"'\\b", "../x"],
    ids=["empty", "dot", "10k", "u", "odd", "path"],
)
def test_safetensors_itself_reads_what_is_written(tmp_path, name):
    write(tmp_path / "f", {name: torch.arange(3.0), "other": torch.ones(2, 2, dtype=torch.bfloat16)})
    back = load_file(tmp_path / "f")
    assert torch.equal(back[name], torch.arange(3.0))


def test_the_bytes_are_those_of_safetensors(tmp_path):
    """The canonical form: same order, same header, same padding as the library's own writer."""
    tensors = {
        f"{dtype}".removeprefix("torch."): random_bits(dtype, (2, 3))
        for dtype in DTYPES
        if dtype != torch.complex128
    }
    tensors["b"], tensors["a"], tensors["é"] = (
        torch.ones(3),
        torch.zeros(()),
        torch.ones(1, dtype=torch.uint8),
    )
    write(tmp_path / "ours", tensors, '{"a":1}')
    save_file(tensors, tmp_path / "theirs", metadata={"steploop": '{"a":1}'})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_complex128_is_stored_as_pairs_of_float64(tmp_path):
    write(tmp_path / "f", {"x": torch.tensor([1 + 2j], dtype=torch.complex128)})
    assert torch.equal(load_file(tmp_path / "f")["x"], torch.tensor([[1.0, 2.0]], dtype=torch.float64))


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    tensors = {
        "b": torch.ones(2),
        "a": torch.zeros(3, dtype=torch.float64),
        "c": torch.ones((), dtype=torch.bool),
    }
    first, _ = write(tmp_path / "1", tensors)
    second, _ = write(tmp_path / "2", dict(reversed(tensors.items())))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    specs = {name: spec_of(name, t) for name, t in tensors.items()}
    assert first == second == hash_tensors(tensors, specs, "{}")


def test_large_tensors_are_hashed_by_a_thread_to_the_same_digest(tmp_path, monkeypatch):
    """Blocks end in the middle of tensors; small ones share a block; a copy is given up only once it is hashed."""
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate([3, 1000, 1, 0, 70, 64, 5000])}
    tensors["transposed"] = torch.randn(90, 70).t()
    whole, _ = write(tmp_path / "whole", tensors)
    monkeypatch.setattr(tensors_module, "BLOCK", 256)
    blocks, specs = write(tmp_path / "blocks", tensors)
    assert blocks == whole
    assert (tmp_path / "blocks").read_bytes() == (tmp_path / "whole").read_bytes()
    back = read(tmp_path / "blocks", blocks, specs)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_saving_needs_no_memory_for_contiguous_tensors_and_that_of_one_for_others(tmp_path):
    """Peak memory of a save: the largest tensor above the state. torch's allocations are watched through a counter."""
    from torch.utils._python_dispatch import TorchDispatchMode

    live, peak = 0, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}:
                nonlocal live, peak
                live += out.nbytes
                peak = max(peak, live)
                import weakref

                weakref.finalize(out.untyped_storage(), lambda n=out.nbytes: release(n))
            return out

    def release(n):
        nonlocal live
        live -= n

    tensors = {f"t{i}": torch.zeros(300, 700 + i).t() for i in range(5)}
    largest = max(t.nbytes for t in tensors.values())
    tracemalloc.start()
    with Watch():
        write(tmp_path / "f", tensors)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest <= peak <= largest + 1000
    assert python_peak < 2 * tensors_module.BLOCK + 200_000


# -- files that are not what the manifest says ----------------------------------------------------------------------


def test_a_file_of_another_size_is_refused_unread(tmp_path):
    record, specs = write(tmp_path / "f", {"x": torch.arange(6.0)})
    data = (tmp_path / "f").read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        (tmp_path / "f").write_bytes(changed)
        with pytest.raises(
            CheckpointDamagedError, match=f"f has {len(changed)} bytes, but the manifest says {len(data)}"
        ):
            read(tmp_path / "f", record, specs)


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path):
    record, specs = write(tmp_path / "f", {"x": torch.arange(6.0)})
    file = LOCAL.open(tmp_path, "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-3])
    with pytest.raises(CheckpointDamagedError, match="it was cut short while it was read"):
        read_tensors(file, "f", record, specs, "{}")
    file.close()


def test_values_stay_as_they_were_when_the_file_changes_later(tmp_path):
    """A mapped file would change under the program, or kill it with SIGBUS."""
    record, specs = write(tmp_path / "f", {"x": torch.arange(60_000.0)})
    back = read(tmp_path / "f", record, specs)
    with (tmp_path / "f").open("r+b") as file:
        file.write(bytes(9999))
        file.truncate(5000)
    assert torch.equal(back["x"], torch.arange(60_000.0))


def test_a_header_that_is_not_the_tables_is_refused(tmp_path):
    """The header is compared, never parsed: 100 MB of it or 1.77 million empty tensors cost nothing."""
    record, specs = write(tmp_path / "f", {"x": torch.arange(6.0)})
    data = bytearray((tmp_path / "f").read_bytes())
    data[20] ^= 1
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(
        CheckpointDamagedError, match=r"The header of .*f does not match the manifest's table"
    ):
        read(tmp_path / "f", record, specs)


def test_too_many_tensors_or_names_too_long_are_refused_at_save():
    spec = TensorSpec("float32", (0,))
    with pytest.raises(
        CheckpointUnsupportedError,
        match=f"would have {MAX_TENSORS + 1} tensors, but it holds at most {MAX_TENSORS}",
    ):
        header_bytes(dict.fromkeys(map(str, range(MAX_TENSORS + 1)), spec), "{}")
    with pytest.raises(
        CheckpointUnsupportedError, match=f"would have a header of {MAX_HEADER_BYTES + 88} bytes"
    ):
        header_bytes({"x" * MAX_HEADER_BYTES: spec}, "{}")


BAD_ENTRIES = {
    "no object": 3,
    "no shape": {"dtype": "float32"},
    "more": {"dtype": "float32", "shape": [], "code": "os.system"},
    "dtype of code": {"dtype": "__import__('os')", "shape": []},
    "dtype of another type": {"dtype": ["float32"], "shape": []},
    "negative": {"dtype": "float32", "shape": [-1]},
    "true for 1": {"dtype": "float32", "shape": [True]},
    "1.0 for 1": {"dtype": "float32", "shape": [1.0]},
    "too large": {"dtype": "float32", "shape": [2**62]},
    "too large together": {"dtype": "float32", "shape": [2**31, 2**31]},
    "empty, and too large": {"dtype": "float32", "shape": [0, 2**61, 2**61]},
    "many axes": {"dtype": "float32", "shape": [1] * 17},
    "100,000 axes": {"dtype": "float32", "shape": [1] * 100_000},
    "strides with a gap": {"dtype": "float32", "shape": [2, 3], "stride": [4, 1]},
    "strides that overlap": {"dtype": "float32", "shape": [2, 3], "stride": [1, 1]},
    "strides out of bounds": {"dtype": "float32", "shape": [2, 1], "stride": [1, 10**9]},
    "row-major strides": {"dtype": "float32", "shape": [2, 3], "stride": [3, 1]},
    "strides of another rank": {"dtype": "float32", "shape": [2, 3], "stride": [1]},
    "strides of nothing": {"dtype": "float32", "shape": [0, 3], "stride": [1, 0]},
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_a_hostile_table_entry_is_refused_before_anything_is_allocated(kind):
    with pytest.raises(CheckpointDamagedError, match="The table of tensors is damaged: 'x': "):
        spec_from_json("x", BAD_ENTRIES[kind])


@given(st.lists(st.integers(1, 4), max_size=5), st.randoms())
def test_the_strides_of_every_permutation_come_back(shape, rng):
    order = list(range(len(shape)))
    rng.shuffle(order)
    tensor = torch.zeros([shape[i] for i in order]).permute([order.index(i) for i in range(len(shape))])
    spec = spec_of("x", tensor)
    assert spec == spec_from_json("x", spec.to_json())
    assert (torch.empty(shape).stride() if spec.stride is None else spec.stride) == tensor.stride()


def test_a_record_is_compared_to_the_last_byte(tmp_path):
    record, specs = write(tmp_path / "f", {"x": torch.arange(6.0)})
    wrong = FileRecord(record.size, "0" * 64)
    with pytest.raises(
        CheckpointDamagedError, match=f"has the SHA-256 {record.sha256}, but the manifest says 0000"
    ):
        read(tmp_path / "f", wrong, specs)
