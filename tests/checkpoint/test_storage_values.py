"""Plain values as strict JSON, sealed files, and the checks of a manifest."""

import json
import math
import time

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.checkpoint.format.json_values import (
    MAX_DEPTH,
    check_json,
    decode,
    encode,
    read_json,
    write_json,
)
from steploop.checkpoint.format.layout import TensorSpec
from steploop.checkpoint.format.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from steploop.checkpoint.format.sealing import seal, unseal
from steploop.checkpoint.format.tensor_files import FileRecord
from steploop.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointUnsupportedError,
    CheckpointVersionError,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats() | TEXT
KEYS = st.none() | st.booleans() | st.integers(-9, 9) | TEXT
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b):
    """Equal in value, type, order, sign of zero, and in being nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(
            same(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@given(VALUES)
def test_every_plain_value_comes_back_exactly(value):
    """Tuple and list, True and 1, 1 and 1.0, nan, inf, -0.0, keys that are no text, and the order of keys."""
    text = write_json({"value": encode(value, "value", {})})
    back = decode(read_json(text, "file", limit=len(text))["value"], "value", {})
    assert same(back, value)


def test_tensors_among_values_come_back_as_they_are_named():
    one, two = torch.ones(2), torch.zeros(())
    held = {}
    text = encode({"al": [None, one, (two,)], "lr": two}, "slots.w", held)
    assert list(held) == ["slots.w.al.1", "slots.w.al.2.0", "slots.w.lr"]
    back = decode(text, "slots", held)
    assert back["al"][1] is one
    assert back["al"][2][0] is back["lr"] is two


def test_two_tensors_whose_dotted_names_coincide_are_both_kept():
    held = {}
    text = encode({"a": {"b.c": torch.zeros(1)}, "a.b": {"c": torch.ones(1)}}, "slots", held)
    back = decode(text, "slots", held)
    assert (back["a"]["b.c"].item(), back["a.b"]["c"].item()) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2**64, r"x\.0 is 18446744073709551616, but a checkpoint holds whole numbers below 2\*\*64"),
        ({1, 2}, r"x\.0 is a set \(\{1, 2\}\), but a checkpoint holds None, bool, int"),
        (b"bytes", r"x\.0 is a bytes"),
        (print, r"x\.0 is a builtin_function_or_method"),
        (1 + 2j, r"x\.0 is a complex"),
    ],
    ids=str,
)
def test_values_that_json_cannot_hold_exactly_are_refused(value, said):
    with pytest.raises(CheckpointUnsupportedError, match=said):
        encode([value], "x", {})


def test_texts_and_depths_that_could_not_be_read_back_are_refused_at_save():
    with pytest.raises(CheckpointUnsupportedError, match="cannot be read back from a checkpoint"):
        check_json({"x": "\udc80"})
    deep = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(CheckpointUnsupportedError, match="nested more than 32 levels deep"):
        check_json({"x": deep})


@pytest.mark.parametrize(
    "value",
    [
        {"tuple": 1},
        {"dict": [[1]]},
        {"dict": [[[], 1]]},
        {"float": "1"},
        {"tensor": "absent"},
        {"code": "os.system"},
        {},
        {"tuple": [], "x": 1},
    ],
    ids=str,
)
def test_what_no_steploop_writes_is_refused(value):
    with pytest.raises(CheckpointDamagedError, match="which steploop never writes"):
        decode([value], "slots", {})


# Python's own reader takes every one of these but the last few.
NOT_JSON = {
    "nan": (b'{"x": NaN}', "NaN is not a number"),
    "infinity": (b'{"x": -Infinity}', "-Infinity is not a number"),
    "overflow": (b'{"x": 1e999}', "the number 1e999 is not finite"),
    "twice": (b'{"x": 1, "x": 2}', "a key occurs twice"),
    "twice within": (b'{"x": {"y": 1, "y": 1}}', "a key occurs twice"),
    "5,000 digits": (b'{"x": ' + b"9" * 5000 + b"}", "has more than 64 bits"),
    "65 bits": (b'{"x": 18446744073709551616}', "has more than 64 bits"),
    "half a character": (b'{"x": "\\ud800"}', "surrogates not allowed"),
    "half a character as a key": (b'{"\\udfff": 1}', "surrogates not allowed"),
    "utf-16": ('{"x": 1}'.encode("utf-16"), "codec can't decode"),
    "a byte order mark": (b'\xef\xbb\xbf{"x": 1}', "BOM"),
    "latin-1": (b'{"x": "\xe9"}', "codec can't decode"),
    "a list": (b"[1]", "the outermost value is not an object"),
    "100,000 deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 32 levels deep"),
    "100,000 deep, open": (b'{"x": ' + b"[" * 100_000, "nested more than 32 levels deep"),
    "33 deep": (b'{"x": ' + b"[" * 33 + b"]" * 33 + b"}", "nested more than 32 levels deep"),
    "nothing": (b"", "Expecting value"),
    "a pickle": (b"\x80\x04\x95\x0b\x00", "codec can't decode"),
    "comments": (b'{"x": 1} // no', "Extra data"),
    "too long": (b'{"x": "' + b"a" * 1_000_000 + b'"}', "it has 1000009 bytes, and at most 999999 are read"),
}


@pytest.mark.parametrize("kind", NOT_JSON)
def test_only_json_is_read_and_only_once_for_each_key(kind):
    text, said = NOT_JSON[kind]
    start = time.process_time()
    with pytest.raises(CheckpointDamagedError, match=r"^file is not the JSON that steploop writes: .*") as e:
        read_json(text, "file", limit=999_999)
    assert said in str(e.value)
    assert time.process_time() - start < 1.0


def manifest(**changes):
    fields = {
        "files": {"model.safetensors": FileRecord(12, "ab" * 32)},
        "tensors": {"model.safetensors": {"w": TensorSpec("float32", (1,))}},
        "metadata": {"model.safetensors": "{}"},
        "state": {"several": False, "states": {}},
    }
    return Manifest(**(fields | changes))


def body_of(text):
    return json.loads(text)


def test_a_manifest_comes_back_with_its_digest():
    text, digest = manifest().seal()
    assert parse_manifest(text) == attrs.evolve(manifest(), sha256=digest)
    assert body_of(text)["sha256"] == digest


@given(st.data())
def test_no_byte_of_a_sealed_file_is_free(data):
    text, _ = seal({"a": [1, 2.5, "é"], "b": {"c": None}})
    at = data.draw(st.integers(0, len(text) - 1))
    changed = bytearray(text)
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CheckpointDamagedError):
        unseal(bytes(changed), "file", limit=10_000)


def test_white_space_or_another_order_of_keys_is_not_the_same_file():
    text, _ = seal({"a": 1, "b": 2})
    for changed in (text + b"\n", text.replace(b": 1", b":  1"), json.dumps(body_of(text)).encode()):
        with pytest.raises(CheckpointDamagedError, match="its bytes have changed"):
            unseal(changed, "file", limit=10_000)


HOSTILE = {
    "another format": ({"format": "pytorch"}, "is of the format 'pytorch'; expected 'steploop checkpoint'"),
    "more keys": ({"run": "os.system"}, "which are not those of version 1"),
    "a path": ({"files": {"../x": {"size": 1, "sha256": "ab" * 32}}}, r"lists a file '../x', but a name has up to 128"),
    "a root path": ({"files": {"/etc/passwd": {"size": 1, "sha256": "ab" * 32}}}, "lists a file '/etc/passwd'"),
    "a NUL": ({"files": {"a\0b": {"size": 1, "sha256": "ab" * 32}}}, "lists a file 'a"),
    "a newline": ({"files": {"ab\n": {"size": 1, "sha256": "ab" * 32}}}, "lists a file 'ab"),
    "a hidden file": ({"files": {".bashrc": {"size": 1, "sha256": "ab" * 32}}}, "lists a file '.bashrc'"),
    "itself": ({"files": {"state.json": {"size": 1, "sha256": "ab" * 32}}}, "lists a file 'state.json'"),
    "a long name": ({"files": {"a" * 129: {"size": 1, "sha256": "ab" * 32}}}, "lists a file 'aaaa"),
    "true for a size": ({"files": {"a": {"size": True, "sha256": "ab" * 32}}}, "expected the size and SHA-256 of a"),
    "1.0 for a size": ({"files": {"a": {"size": 1.0, "sha256": "ab" * 32}}}, "expected the size and SHA-256 of a"),
    "a negative size": ({"files": {"a": {"size": -1, "sha256": "ab" * 32}}}, "expected the size and SHA-256 of a"),
    "no digest": ({"files": {"a": {"size": 1, "sha256": "AB" * 32}}}, "expected the size and SHA-256 of a"),
    "files of another kind": ({"files": [1]}, "expected an object"),
    "many files": (
        {key: {f"f{i}": {"size": 1, "sha256": "ab" * 32} if key == "files" else ({} if key == "tensors" else "") for i in range(17)} for key in ("files", "tensors", "metadata")},
        "the files listed and the tables of tensors do not match",
    ),
    "other tables": ({"tensors": {}}, "the files listed and the tables of tensors do not match"),
    "a table of another kind": ({"tensors": {"model.safetensors": []}}, "expected an object"),
    "metadata of another kind": ({"metadata": {"model.safetensors": 1}}, "the metadata of a file is not text"),
    "100,001 tensors": ({"tensors": {"model.safetensors": dict.fromkeys(map(str, range(100_001)), 0)}}, "has 100001 tensors"),
    "a reserved name": ({"tensors": {"model.safetensors": {"__metadata__": {}}}}, "tensors in model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_manifest_with_a_digest_that_is_right_is_refused(kind):
    """Whoever rewrites the digest too gets no further than to a typed error."""
    changes, said = HOSTILE[kind]
    body = body_of(manifest().seal()[0]) | changes
    with pytest.raises(CheckpointDamagedError) as e:
        parse_manifest(seal(body)[0])
    assert said in str(e.value)


@pytest.mark.parametrize("version", [0, 3, 99, "1", "2", True, 1.0, None], ids=repr)
def test_another_format_version_is_refused_with_both_versions(version):
    body = body_of(manifest().seal()[0]) | {"version": version}
    with pytest.raises(
        CheckpointVersionError,
        match=f"has the format version {version}, and this steploop reads the versions 1",
    ) as e:
        parse_manifest(seal(body)[0])
    assert e.value.exit_code == 3


def test_a_manifest_without_a_version_is_refused():
    body = {k: v for k, v in body_of(manifest().seal()[0]).items() if k != "version"}
    with pytest.raises(CheckpointError, match="has the format version None"):
        parse_manifest(seal(body)[0])


def test_a_long_manifest_is_refused_unread():
    with pytest.raises(CheckpointDamagedError, match=f"at most {MAX_MANIFEST_BYTES} are read"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1))


def test_nothing_but_a_finite_number_is_one():
    assert math.isnan(decode({"float": "nan"}, "x", {}))
    assert decode({"float": "-inf"}, "x", {}) == -math.inf
