"""Digits, library source and shapes: what the recipes share, and what is said where they cannot be had."""

import gzip
import math
import struct
import time
import urllib.request

import pytest
import torch

from steploop.core.extras import import_extra
from steploop.data.sources import digits as digits_module
from steploop.data.sources import network, text
from steploop.data.sources.digits import load_digits
from steploop.data.sources.network import open_url
from steploop.data.sources.shapes import SHAPE_CLASSES, draw_shapes
from steploop.data.sources.text import library_files, read_text
from steploop.errors import ConfigError, DataError, MissingExtraError

# -- digits -------------------------------------------------------------------------------------------------


def unreachable(url, *, timeout_s):
    raise DataError(f"{url} gave no answer within {timeout_s:g} s")


def write_mnist(root):
    """A tiny MNIST, in the files that torchvision reads: pixel values tell the sets apart."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 5), ("t10k", 3)):
        images = struct.pack(">4i", 2051, count, 28, 28) + bytes([count]) * (count * 784)
        labels = struct.pack(">2i", 2049, count) + bytes(range(count))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def test_digits_are_1797_of_28_by_28_in_the_middle():
    found = load_digits("digits")
    (train, train_labels), (test, test_labels) = found.train, found.test
    assert train.shape == (1400, 1, 28, 28)
    assert test.shape == (397, 1, 28, 28)
    assert (train.dtype, train_labels.dtype) == (torch.uint8, torch.int64)
    border = torch.ones(28, 28, dtype=torch.bool)
    border[4:24, 4:24] = False
    assert not train[..., border].any()
    assert train.max() == 255
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert found.description.startswith("scikit-learn's 1,797 handwritten digits enlarged to 28x28")


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_mnist_on_disk_needs_no_network(source, tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "open_url", unreachable)
    write_mnist(tmp_path)
    found = load_digits(source, root=tmp_path)
    assert found.train[0].shape == (5, 1, 28, 28)
    assert (found.test[0] == 3).all()
    assert found.test[1].tolist() == [0, 1, 2]
    assert found.description.startswith("MNIST")


def test_without_network_auto_gives_scikit_learns_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "open_url", unreachable)
    assert load_digits("auto", root=tmp_path).description.endswith(
        "MNIST is not on disk and could not be downloaded"
    )
    with pytest.raises(
        DataError, match=r"MNIST is not in .*MNIST and could not be downloaded \(https://.*0.5 s\)"
    ):
        load_digits("mnist", root=tmp_path, timeout_s=0.5)


def test_mnist_that_can_be_had_is_downloaded_with_a_timeout(tmp_path, monkeypatch):
    import socket

    from torchvision import datasets

    real, asked = datasets.MNIST, []

    class Downloading(real):
        def __init__(self, root, *, train=True, download=False):
            if download:
                asked.append(socket.getdefaulttimeout())
                write_mnist(tmp_path)
            super().__init__(root, train=train)

    # torchvision derives the folder's name from the class
    Downloading.__name__ = "MNIST"
    monkeypatch.setattr(datasets, "MNIST", Downloading)
    monkeypatch.setattr(digits_module, "open_url", lambda url, timeout_s: gzip.io.BytesIO())
    before = socket.getdefaulttimeout()
    assert load_digits("auto", root=tmp_path, timeout_s=0.5).description.startswith("MNIST")
    assert asked == [2.0]
    assert socket.getdefaulttimeout() == before


def test_a_source_that_is_none_is_refused():
    with pytest.raises(ConfigError, match='source must be "auto", "mnist" or "digits", got \'letters\''):
        load_digits("letters")


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        load_digits("digits")
    assert "Training on handwritten digits without MNIST needs sklearn, which is not installed" in str(
        caught.value
    )
    assert str(caught.value).endswith("pip install 'steploop[recipes]'")


def test_an_extra_that_is_there_is_imported():
    assert import_extra("math", extra="none", purpose="Nothing").pi == math.pi


# -- network ------------------------------------------------------------------------------------------------


def test_an_address_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda url, timeout: time.sleep(1))
    with pytest.raises(DataError, match=r"^https://nowhere gave no answer within 0.01 s$"):
        open_url("https://nowhere", timeout_s=0.01)


def test_an_address_that_says_no_is_named_with_the_reason(monkeypatch):
    def refuse(url, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match="https://nowhere cannot be reached: OSError: no route to host"):
        open_url("https://nowhere", timeout_s=1.0)


def test_an_answer_is_handed_on(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: (url, timeout))
    assert open_url("https://somewhere", timeout_s=1.0) == ("https://somewhere", 1.0)


# -- text ---------------------------------------------------------------------------------------------------


def test_library_files_are_those_that_people_read_in_order(tmp_path, monkeypatch):
    for name in (
        "b.py",
        "a.py",
        "a.txt",
        "email/z.py",
        "email/mime/y.py",
        "email/test/x.py",
        "email/__pycache__/w.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda _: str(tmp_path))
    assert [p.name for p in library_files()] == ["a.py", "b.py"]
    assert [p.name for p in library_files("email")] == ["y.py", "z.py"]
    with pytest.raises(
        DataError, match=r"no Python source was found in .*tkinter: this installation of Python"
    ):
        library_files("tkinter")


def test_this_python_has_the_packages_that_the_recipes_read():
    assert len(library_files()) > 50
    assert all(len(library_files(name)) > 1 for name in ("asyncio", "email", "xml"))


def test_text_that_is_not_utf_8_is_read_all_the_same(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read_text(tmp_path / "latin.txt") == "caf\N{REPLACEMENT CHARACTER}"
    with pytest.raises(DataError, match="cannot be read as text: Is a directory"):
        read_text(tmp_path)


# -- shapes -------------------------------------------------------------------------------------------------


def test_shapes_are_a_function_of_their_arguments():
    torch.manual_seed(1)
    first = draw_shapes(6, size=32, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again, other = draw_shapes(6, size=32, seed=3), draw_shapes(6, size=32, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    images, masks = first
    assert images.shape == (6, 3, 32, 32)
    assert masks.shape == (6, 32, 32)
    assert images.dtype == masks.dtype == torch.uint8


def test_every_class_is_seen_and_a_mask_tells_shape_from_background():
    images, masks = draw_shapes(60, size=32, noise=0.0)
    assert set(masks.unique().tolist()) == set(range(len(SHAPE_CLASSES)))
    for image, mask in zip(images, masks, strict=True):
        background = image[:, mask == 0]
        assert (background == background[:, :1]).all()  # one colour, as there is no noise
    assert (draw_shapes(2, size=8, shapes=0)[1] == 0).all()


@pytest.mark.parametrize(
    ("kind", "area"), [(1, math.pi), (2, 2.0), (3, 3 * math.sqrt(3) / 4)], ids=["disc", "square", "triangle"]
)
def test_a_shape_has_the_area_that_geometry_gives_it(kind, area):
    """In units of the radius squared: of the circle, and of the polygons whose corners lie on it."""
    from steploop.data.sources.shapes import _inside

    axis = torch.linspace(-1.5, 1.5, 601)
    u, v = axis[None, None, :], axis[None, :, None]
    inside = _inside(torch.full((1, 1, 1), kind), u, v, torch.ones(1, 1, 1))
    assert float(inside.float().mean()) * 9 == pytest.approx(area, rel=0.01)
    corners = (u**2 + v**2).expand_as(inside)[inside]
    assert float(corners.max()) == pytest.approx(1.0, abs=0.02)
