"""A file that takes the place of another: whole or not at all, and nothing is left beside it."""

import errno
import os
from pathlib import Path

import pytest

from steploop.core.atomic_files import replace_file


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "a.json"
    for data in (b"old", b"new"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_the_content_is_flushed_before_it_takes_the_name(durable, tmp_path, monkeypatch):
    calls = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (calls.append(("replace", self.name)), replace(self, to))[1]
    )
    replace_file(tmp_path / "a", b"four", durable=durable)
    assert calls == [("fsync", 4)] * durable + [("replace", f".a-{os.getpid()}")]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_one_that_cannot_be_written_leaves_the_old_one_and_nothing_else(operation, tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if operation == "fsync" else (Path, "replace")), failing)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new", durable=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
