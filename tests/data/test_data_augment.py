"""Whole-batch augmentation, compared with one image at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from steploop.data.augment import normalize, random_crop, random_flip
from steploop.errors import ConfigError

shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(3, 9), st.integers(3, 9))
seeds = st.integers(0, 2**32)


def bytes_of(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(shapes, st.integers(0, 2), seeds, st.sampled_from(["constant", "reflect"]), st.booleans())
def test_a_crop_is_a_window_of_the_padded_image(shape, padding, seed, mode, channels_last):
    images = bytes_of(shape)
    before = images.clone()
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    got = random_crop(images, padding=padding, generator=generator(seed), mode=mode)
    offsets = torch.randint(0, 2 * padding + 1, (2, shape[0]), generator=generator(seed)).tolist()
    padded = F.pad(images.float(), (padding,) * 4, mode=mode).to(torch.uint8)
    for i, (top, left) in enumerate(zip(*offsets, strict=True)):
        assert got[i].equal(padded[i, :, top : top + shape[2], left : left + shape[3]])
    assert got.dtype == torch.uint8
    assert images.equal(before)


def test_all_offsets_of_a_crop_come_up():
    image = torch.zeros(1, 1, 5, 5)
    image[0, 0, 2, 2] = 1
    got = random_crop(image.expand(2000, 1, 5, 5), padding=1, generator=generator())
    assert ((got.sum(0) > 150) == F.pad(torch.ones(1, 3, 3, dtype=torch.bool), (1,) * 4)).all()


@given(shapes, seeds, st.floats(0, 1))
def test_a_flip_mirrors_the_chosen_images_and_leaves_the_others(shape, seed, p):
    images = bytes_of(shape)
    before = images.clone()
    got = random_flip(images, generator=generator(seed), p=p)
    chosen = torch.rand(shape[0], generator=generator(seed)) < p
    for i, mirrored in enumerate(chosen.tolist()):
        assert got[i].equal(images[i].flip(2) if mirrored else images[i])
    assert images.equal(before)


@given(shapes, st.booleans(), st.sampled_from([torch.uint8, torch.float32, torch.float64]))
def test_normalize_is_its_equation_in_either_layout(shape, channels_last, dtype):
    images = bytes_of(shape)
    if dtype != torch.uint8:
        images = images.to(dtype) / 255
    before = images.clone()
    mean = [0.1 * (c + 1) for c in range(shape[1])]
    std = [0.2 + 0.1 * c for c in range(shape[1])]
    got = normalize(images, mean=mean, std=std, channels_last=channels_last)
    pixels = images.double() / (255 if dtype == torch.uint8 else 1)
    wanted = (pixels - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(-1, 1, 1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert images.equal(before)


def test_the_layout_does_not_change_a_bit_of_the_values():
    images = bytes_of((7, 3, 11, 13))
    how = {"mean": (0.49, 0.48, 0.45), "std": (0.24, 0.25, 0.26)}
    assert normalize(images, **how).equal(normalize(images, **how, channels_last=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: random_crop(torch.zeros(3, 4, 4), padding=1, generator=generator()),
            r"\(B, C, H, W\), got \(3, 4, 4\)",
        ),
        (
            lambda: random_crop(torch.zeros(1, 1, 4, 4), padding=-1, generator=generator()),
            "padding must be .* >= 0, got -1",
        ),
        (
            lambda: random_crop(torch.zeros(1, 1, 4, 4), padding=4, generator=generator(), mode="reflect"),
            r"padding must be an integer in 0\.\.3, got 4",
        ),
        (
            lambda: random_crop(torch.zeros(1, 1, 4, 4), padding=1, generator=generator(), mode="edge"),
            "mode must be 'constant' or 'reflect', got 'edge'",
        ),
        (
            lambda: random_flip(torch.zeros(1, 1, 4, 4), generator=generator(), p=1.5),
            r"probability in 0\.\.1, got 1\.5",
        ),
        (lambda: normalize(torch.zeros(1, 3, 4, 4), mean=[0.5], std=[1.0]), "must have 3 numbers each"),
        (lambda: normalize(torch.zeros(1, 1, 4, 4), mean=[0.5], std=[0.0]), "only positive ones"),
        (
            lambda: normalize(torch.zeros(1, 1, 4, 4, dtype=torch.int64), mean=[0.5], std=[1.0]),
            "uint8 or floating point, got torch.int64",
        ),
    ],
)
def test_illegal_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
