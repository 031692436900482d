"""Images for recipes: from a folder, from the network, made up; and what is said when they cannot be had."""

import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import threading

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from steploop.data.sources import cifar10, network
from steploop.data.sources.digits import load_digits
from steploop.data.sources.images import channel_statistics, load_images
from steploop.data.sources.progress import showing
from steploop.data.sources.synthetic import SyntheticImageDataset
from steploop.errors import ConfigError, DataError, EmptyDataError, MissingExtraError


def picture(path, color, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def tree(tmp_path):
    for part in ("train", "val"):
        for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            for i in range(2):
                picture(tmp_path / part / name / f"{i}.png", color)
    return tmp_path


def test_a_folder_is_read_class_by_class_in_the_order_of_names(tree):
    seen = []
    data = load_images("folder", root=tree, progress=lambda *args: seen.append(args))
    assert data.classes == ("blue", "red")
    assert data.train_images.shape == (4, 3, 4, 6)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images[:, :, 0, 0].tolist() == [[0, 0, 255]] * 2 + [[255, 0, 0]] * 2
    assert seen == [("decoding images", 4, 8), ("decoding images", 8, 8)]
    assert (data.name, data.note) == ("folder", f"The images under {tree}.")
    assert data.train[0] is data.train_images
    assert data.test[1] is data.test_labels


def test_images_of_other_sizes_and_modes_are_fitted(tree):
    picture(tree / "train" / "red" / "9.png", 100, (12, 12), mode="L")
    (tree / "train" / "red" / "notes.txt").touch()
    data = load_images("folder", root=tree)
    assert data.train_images.shape == (5, 3, 4, 6)
    assert data.train_images[4].eq(100).all()
    assert data.note.endswith(
        "of which 1 were brought to one size. Left out: 1 file of another kind (.txt 1)."
    )
    assert load_images("folder", root=tree, size=3).test_images.shape == (4, 3, 3, 3)


def test_fitting_keeps_the_middle(tree):
    image = Image.new("RGB", (30, 4), (0, 0, 0))
    image.paste((9, 9, 9), (12, 0, 18, 4))
    image.save(tree / "val" / "red" / "9.png")
    assert load_images("folder", root=tree).test_images[4].eq(9).all()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (
            lambda t: (t / "val").rename(t / "other"),
            DataError,
            r"must hold .* val/\); found: \['other', 'train'\]",
        ),
        (
            lambda t: (t / "val" / "red").rename(t / "val" / "green"),
            DataError,
            r"same classes; only in one .*\['green', 'red'\]",
        ),
        (
            lambda t: [p.unlink() for p in (t / "val").rglob("*.png")],
            EmptyDataError,
            "val/blue holds no images .* a class without samples",
        ),
    ],
)
def test_a_tree_of_another_shape_is_explained(tree, spoil, error, message):
    spoil(tree)
    with pytest.raises(error, match=message):
        load_images("folder", root=tree)


def test_a_folder_too_large_for_memory_is_refused_before_decoding(tree):
    with pytest.raises(DataError, match=r"100000x100000, would take 224 GiB of memory: give a smaller size="):
        load_images("folder", root=tree, size=100_000)


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match="data must be one of auto, cifar10, folder, synthetic, got 'cifar'"
    ):
        load_images("cifar")
    with pytest.raises(ConfigError, match="data='folder' needs root="):
        load_images("folder")
    with pytest.raises(ConfigError, match="32x32, and size=64"):
        load_images("cifar10", size=64)
    with pytest.raises(DataError, match="found: no such directory"):
        load_images("folder", root=tmp_path / "nowhere")
    with pytest.raises(EmptyDataError, match="the train set of synthetic has no images"):
        load_images("synthetic", train_samples=0)


def test_synthetic_images_are_a_function_of_the_seed():
    data = load_images("synthetic", train_samples=30, test_samples=20, seed=1)
    again = load_images("synthetic", train_samples=30, test_samples=20, seed=1)
    assert data.train_images.equal(again.train_images)
    assert data.train_images.shape == (30, 3, 32, 32)
    assert data.train_labels.tolist() == list(range(10)) * 3
    assert not data.train_images.equal(load_images("synthetic", train_samples=30, seed=2).train_images)
    assert not data.train_images[:20].equal(data.test_images)
    # test samples follow on the training ones
    whole = SyntheticImageDataset(50, seed=1)
    assert data.test_images.equal(whole.tensors()[0][30:])
    assert whole[31][1] == int(data.test_labels[1]) == 1
    with pytest.raises(IndexError):
        whole[50]
    with pytest.raises(ConfigError, match="noise must be a number >= 0, got -1"):
        SyntheticImageDataset(1, noise=-1)


def test_synthetic_classes_can_be_told_apart_but_not_at_a_glance():
    """Nearest mean of the training images: far better than chance, far from perfect; a network does the rest."""
    data = load_images("synthetic", train_samples=1000, test_samples=300)
    x, y = data.train_images.float().flatten(1), data.train_labels
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    right = (
        torch.cdist(data.test_images.float().flatten(1), means).argmin(1).eq(data.test_labels).float().mean()
    )
    assert 0.3 < right < 0.98


def test_channel_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0), rtol=1e-6, atol=1e-6
    )


class Served(io.BytesIO):
    """A response of a server."""

    headers = {"Content-Length": "10"}  # noqa: RUF012  (as http.client has it)


def test_auto_without_a_network_is_synthetic_and_says_so(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(network.urllib.request, "urlopen", unreachable)
    data = load_images("auto", root=tmp_path / "here", train_samples=20, test_samples=10)
    assert data.name == "synthetic"
    assert "CIFAR-10 could not be loaded: it is not in" in data.note
    assert "OSError: Network is unreachable. Using SYNTHETIC images; ignore their accuracy." in data.note
    assert not (tmp_path / "here").exists()
    with pytest.raises(DataError, match="cannot be reached: OSError: Network is unreachable"):
        load_images("cifar10", root=tmp_path)


def test_a_server_that_never_answers_is_given_up(monkeypatch, tmp_path):
    done = threading.Event()
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda *_, **__: done.wait(60))
    data = load_images("auto", root=tmp_path, train_samples=20, test_samples=10, timeout_s=0.05)
    done.set()
    assert "gave no answer within 0.05 s" in data.note


def test_a_download_that_is_cut_off_or_changed_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda *_, **__: Served(b"short"))
    with pytest.raises(
        DataError, match="5 bytes came, of 10, and their SHA-256 digest is not that of CIFAR-10"
    ):
        load_images("cifar10", root=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_with_the_right_md5_and_other_bytes_is_not_unpacked(monkeypatch, tmp_path):
    """MD5 can be forged: neither an archive that lies there nor one that comes is believed for it."""
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(b"forged").hexdigest())
    monkeypatch.setattr(network.urllib.request, "urlopen", lambda *_, **__: Served(b"forged"))
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"forged")
    with pytest.raises(DataError, match="their SHA-256 digest is not that of CIFAR-10"):
        load_images("cifar10", root=tmp_path)


def test_cifar10_is_downloaded_once_and_then_read_from_disk(monkeypatch, tmp_path):
    """The archive's own format, in small: the digests are those of the files made here."""
    names = ["data_batch_1", "test_batch", "batches.meta"]
    rows = {
        name: torch.randint(0, 256, (n, 3072), dtype=torch.uint8)
        for name, n in zip(names, (4, 2), strict=False)
    }
    held = {name: pickle.dumps({"data": r.numpy(), "labels": [1] * len(r)}) for name, r in rows.items()}
    held["batches.meta"] = pickle.dumps({"label_names": ["cat", "dog"]})
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in held.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in held.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [(names[0], md5[names[0]])])
    monkeypatch.setattr(CIFAR10, "test_list", [(names[1], md5[names[1]])])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": names[2], "key": "label_names", "md5": md5[names[2]]})
    monkeypatch.setattr(cifar10, "_SHA256", hashlib.sha256(file.getvalue()).hexdigest())
    asked = []
    monkeypatch.setattr(
        network.urllib.request, "urlopen", lambda url, **_: asked.append(url) or Served(file.getvalue())
    )
    seen = []
    for _ in range(2):
        data = load_images("auto", root=tmp_path, progress=lambda *args: seen.append(args))
        assert (data.name, data.classes) == ("cifar10", ("cat", "dog"))
        assert data.train_images.equal(rows["data_batch_1"].view(-1, 3, 32, 32))
        assert data.test_labels.tolist() == [1, 1]
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert seen[-1] == ("downloading CIFAR-10", len(file.getvalue()), len(file.getvalue()))


def test_progress_is_silent_without_a_terminal_and_a_bar_with_one(monkeypatch, capsys):
    with showing(None) as show:
        show("reading", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with showing(None) as show:
        show("reading", 1, 2)


def test_without_torchvision_and_pillow_what_needs_them_says_so_and_auto_goes_on(tmp_path, monkeypatch):
    for module in ("torchvision.datasets", "PIL.Image"):
        monkeypatch.setitem(sys.modules, module, None)
    found = load_images("auto", root=tmp_path, train_samples=20, test_samples=10)
    assert "needs torchvision, which is not installed" in found.note
    assert load_digits("auto", root=str(tmp_path)).description.endswith(
        "MNIST needs torchvision, which is not installed"
    )
    for load, message in (
        (
            lambda: load_images("cifar10", root=tmp_path),
            r"Reading CIFAR-10 needs torchvision, .* pip install 'steploop\[recipes\]'",
        ),
        (lambda: load_digits("mnist", root=str(tmp_path)), "Reading MNIST needs torchvision"),
        (lambda: load_images("folder", root=tmp_path), "Reading a folder of images needs PIL"),
    ):
        with pytest.raises(MissingExtraError, match=message):
            load()


def test_the_package_is_imported_without_torchvision_and_pillow():
    program = (
        "import sys\nsys.modules['torchvision'] = sys.modules['PIL'] = None\nimport steploop, steploop.data\n"
        "for module in (steploop, steploop.data):\n    for name in module.__all__:\n        getattr(module, name)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
