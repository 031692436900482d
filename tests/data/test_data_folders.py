"""Folders of images as people have them: depths, orientations, nesting, damage; what is left out is counted and said."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from PIL import Image

from steploop.data.sources.decoding import Unreadable, decoded, fitted
from steploop.data.sources.images import load_images
from steploop.errors import DataError, EmptyDataError


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def plain(value=7, size=(6, 4)):
    return Image.new("RGB", size, (value, 0, 0))


@pytest.fixture
def tree(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / part / name / "0.png", plain())
    return tmp_path


@given(values=stn.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 5))), suffix=st.sampled_from(["png", "tif", "pgm"]))  # fmt: skip
def test_sixteen_bits_are_scaled_to_the_nearest_of_eight(tmp_path_factory, values, suffix):
    path = tmp_path_factory.mktemp("deep") / f"x.{suffix}"
    save(path, values)
    pixels, more = decoded(str(path))
    expected = np.round(values.astype(np.float64) / 65535 * 255).astype(np.uint8)
    assert np.array_equal(pixels, np.stack([expected] * 3, axis=2))
    assert more == 0


def test_floats_in_0_to_1_are_scaled_and_others_refused_with_their_range(tmp_path):
    ramp = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    save(tmp_path / "x.tif", ramp)
    pixels, _ = decoded(str(tmp_path / "x.tif"))
    assert np.array_equal(pixels[:, :, 0], np.rint(ramp * 255).astype(np.uint8))
    for values, found in (
        (ramp * 255, r"0\.0\.\.255\.0"),
        (ramp - 1, r"-1\.0\.\.0\.0"),
        (ramp * np.nan, r"nan\.\.nan"),
    ):
        save(tmp_path / "x.tif", values)
        with pytest.raises(
            DataError, match=rf"x\.tif is an image of Pillow's mode 'F' with values in {found}, whose"
        ):
            decoded(str(tmp_path / "x.tif"))
    save(tmp_path / "i.tif", np.array([[0, 70_000]], dtype=np.int32))
    with pytest.raises(DataError, match=r"mode 'I' with values in 0\.\.70000.*Convert the images"):
        decoded(str(tmp_path / "i.tif"))
    save(tmp_path / "lab.tif", Image.new("LAB", (2, 2)))
    with pytest.raises(DataError, match="mode 'LAB', whose range is not known"):
        decoded(str(tmp_path / "lab.tif"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_stand_as_their_camera_says(tmp_path, orientation, suffix):
    """Of each orientation of EXIF, against NumPy: how the stored rows and columns are to be shown."""
    stored = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: np.rot90,
    }[orientation](stored)
    exif = Image.Exif()
    exif[274] = orientation
    save(tmp_path / f"x.{suffix}", stored, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(decoded(str(tmp_path / f"x.{suffix}"))[0], upright)


def test_a_turned_picture_of_sixteen_bits_is_turned_too(tmp_path):
    stored = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "x.png", stored, exif=exif)
    assert np.array_equal(decoded(str(tmp_path / "x.png"))[0][:, :, 0], np.rot90(stored, -1) // 257)


@pytest.mark.parametrize(
    ("mode", "color", "shown"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 9, (9, 9, 9)),
        ("LA", (9, 0), (9, 9, 9)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("P", 3, (40, 50, 60)),
    ],
)
def test_every_kind_of_eight_bit_colours_becomes_rgb(tmp_path, mode, color, shown):
    image = Image.new(mode, (2, 2), color)
    if mode == "P":
        image.putpalette([0] * 9 + [40, 50, 60])
    save(tmp_path / "x.tif", image)
    assert decoded(str(tmp_path / "x.tif"))[0].reshape(-1, 3).tolist() == [list(shown)] * 4


def test_fitting_cuts_the_middle_out():
    pixels = np.zeros((4, 30, 3), np.uint8)
    pixels[:, 12:18] = 9
    assert (fitted(pixels, (4, 6)) == 9).all()


def test_directories_within_a_class_belong_to_it_in_the_order_of_paths(tree):
    for at, value in (("b/deep/er/1.png", 20), ("b/deep/0.png", 10), ("a/.hidden/0.png", 99)):
        save(tree / "train" / at, plain(value))
    (tree / "train" / "b" / "deep" / "loop").symlink_to(tree / "train" / "b")
    data = load_images("folder", root=tree)
    assert data.train_labels.tolist() == [0, 1, 1, 1]
    assert data.train_images[:, 0, 0, 0].tolist() == [7, 7, 10, 20]
    assert data.note == f"The images under {tree}."


def test_a_link_to_a_folder_above_brings_in_no_images_of_other_classes(tree, tmp_path):
    before = load_images("folder", root=tree)
    (tree / "train" / "a" / "up").symlink_to(tree / "train")
    (tree / "train" / "a" / "out").symlink_to(tree)
    elsewhere = tmp_path / "elsewhere"
    (tree / "train" / "b").rename(elsewhere)  # a class may lie elsewhere itself
    (tree / "train" / "b").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(tree / "train")
    found = load_images("folder", root=tree)
    assert found.train_labels.tolist() == before.train_labels.tolist()


def test_a_pipe_among_the_images_is_no_image_and_is_not_waited_for(tree):
    os.mkfifo(tree / "train" / "a" / "pipe.png")
    assert "train/a/pipe.png (no regular file)" in load_images("folder", root=tree).note


def test_what_is_left_out_is_counted_and_said(tree):
    save(tree / "train" / "a" / "1.png", plain())
    (tree / "train" / "a" / "broken.png").write_bytes(b"no image")
    whole = (tree / "train" / "a" / "1.png").read_bytes()
    (tree / "train" / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a/notes.txt", "a/more.txt", "b/.DS_Store", "list.csv"):
        (tree / "train" / name).touch()
    save(tree / "test" / "stray.png", plain())
    save(tree / "test" / "a" / "pages.tif", plain(), save_all=True, append_images=[plain(8)])
    (tree / "val").mkdir()
    data = load_images("folder", root=tree)
    assert (len(data.train_images), len(data.test_images)) == (3, 3)
    assert data.train_labels.tolist() == [0, 0, 1]
    assert "2 files that cannot be read: train/a/broken.png (UnidentifiedImageError: " in data.note
    assert "train/b/cut.png (" in data.note
    assert "4 files of another kind (.txt 2, .DS_Store 1, .csv 1)" in data.note
    assert "1 file in no class" in data.note
    assert "all but the first picture of 1 file;" in data.note
    assert data.note.endswith("the directory val/.")


def test_a_class_without_images_is_refused(tree):
    (tree / "train" / "c").mkdir()
    (tree / "test" / "c").mkdir()
    with pytest.raises(
        EmptyDataError, match=r"train/c holds no images .*: a class without samples\. Add some, or"
    ):
        load_images("folder", root=tree)
    (tree / "train" / "c" / "0.png").write_bytes(b"no image")
    save(tree / "test" / "c" / "0.png", plain())
    with pytest.raises(
        EmptyDataError, match=r"no image in .*train/c can be read: c/0\.png \(UnidentifiedImageError"
    ):
        load_images("folder", root=tree)
    for name in ("a", "b"):
        (tree / "train" / name / "0.png").write_bytes(b"")
    with pytest.raises(EmptyDataError, match=r"none of the 3 files in .*train can be read as an image"):
        load_images("folder", root=tree)


def test_an_error_of_the_system_is_no_damaged_image(tree):
    """A file that may be readable tomorrow is not left out today: the number of samples would change."""
    (tree / "train" / "a" / "9.png").symlink_to(tree / "nowhere.png")
    with pytest.raises(DataError, match=r"9\.png cannot be read: FileNotFoundError"):
        load_images("folder", root=tree)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_directory_that_cannot_be_read_is_refused(tree):
    (tree / "train" / "a" / "deep").mkdir(mode=0o000)
    with pytest.raises(DataError, match="deep cannot be read: Permission denied"):
        load_images("folder", root=tree)


def test_a_damaged_file_says_why(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    found = decoded(str(tmp_path / "x.png"))
    assert isinstance(found, Unreadable)
    assert found.reason.startswith("UnidentifiedImageError: ")
