"""Precision: the loss scale is checked at the door, a device gets what suits it, and the choice says why."""

import math

import pytest
import torch

from steploop import LossScale
from steploop.core.precision import autocast, best_precision, check_precision, on_host
from steploop.core.state.surroundings import DefaultDtype
from steploop.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("scale", 0.0, "LossScale: scale must be a finite number > 0, but is 0.0."),
        ("scale", -1.0, "LossScale: scale must be a finite number > 0, but is -1.0."),
        ("scale", math.nan, "LossScale: scale must be a finite number > 0, but is nan."),
        ("scale", 1e39, "LossScale: scale must be a finite number > 0, but is inf."),
        ("growth_factor", 0.0, "LossScale: growth_factor must be a finite number > 0, but is 0.0."),
        ("growth_factor", 1.0, "LossScale: growth_factor must be > 1, but is 1.0."),
        ("backoff_factor", 0.0, "LossScale: backoff_factor must be a finite number > 0, but is 0.0."),
        ("backoff_factor", 1.0, "LossScale: backoff_factor must be < 1, but is 1.0."),
        ("growth_interval", 0, "LossScale: growth_interval must be a finite number > 0, but is 0."),
        ("floor", -1.0, "LossScale: floor must be a finite number >= 0, but is -1.0."),
        ("floor", math.inf, "LossScale: floor must be a finite number >= 0, but is inf."),
    ],
)
def test_an_illegal_loss_scale_is_refused_by_its_name(name, value, expected):
    with pytest.raises(ConfigError) as excinfo:
        LossScale(**{name: value})
    assert str(excinfo.value) == expected


def test_a_scale_below_0_is_refused_even_without_a_floor():
    with pytest.raises(ConfigError, match=r"^LossScale: scale must be a finite number > 0, but is -1\.0\.$"):
        LossScale(scale=-1.0, floor=0.0)


def test_the_defaults_are_those_of_grad_scaler_with_a_floor_of_1():
    theirs = torch.amp.GradScaler("cpu")
    ours = LossScale()
    assert ours.scale == theirs.get_scale()
    assert ours.growth_factor == theirs.get_growth_factor()
    assert ours.backoff_factor == theirs.get_backoff_factor()
    assert ours.growth_interval == theirs.get_growth_interval()
    assert (ours.growth_tracker, ours.floor) == (0, 1.0)


def test_bounds_of_the_legal_ranges_are_legal():
    assert LossScale(scale=5e-324, floor=0.0).scale == 0.0  # float32 has no such number
    assert LossScale(
        scale=2.0**-126, growth_factor=1.0001, backoff_factor=0.9999, growth_interval=1, floor=0.0
    )


def test_a_scale_is_held_as_float32_as_torchs_is():
    assert LossScale(scale=0.1).scale == torch.tensor(0.1).item() != 0.1
    assert LossScale(scale=3).scale == 3.0


def test_a_scale_that_underflowed_to_0_has_an_infinite_inverse_as_torchs():
    scale = LossScale(scale=2.0**-149, floor=0.0).updated(finite=False)
    assert scale.scale == 0.0
    assert scale.inverse() == math.inf
    assert scale.updated(finite=False).scale == 0.0


def test_a_scale_on_the_device_is_read_by_nobody():
    scale = LossScale(scale=torch.tensor(8.0)).updated(finite=False)
    assert isinstance(scale.scale, torch.Tensor)
    assert (scale.scale.item(), scale.inverse().item()) == (4.0, 0.25)


def test_a_scale_on_the_device_is_float32_whatever_the_default_dtype_is():
    with DefaultDtype(torch.float64):
        scale = LossScale(scale=8.0, growth_tracker=3).updated(torch.tensor([True])[0])
    assert (scale.scale.dtype, scale.growth_tracker.dtype) == (torch.float32, torch.int64)
    assert (scale.scale.item(), scale.growth_tracker.item()) == (8.0, 4)


def test_a_scale_goes_to_where_the_answer_is():
    scale = LossScale(scale=8.0).updated(torch.ones((), dtype=torch.bool, device="meta"))
    assert (scale.scale.device.type, scale.growth_tracker.device.type) == ("meta", "meta")


def test_only_a_real_tensor_on_the_cpu_is_read_for_nothing():
    class Traced(torch.Tensor):
        pass

    assert on_host(torch.ones(()))
    assert not on_host(torch.ones((), device="meta"))
    assert not on_host(torch.ones(()).as_subclass(Traced))


def test_an_unknown_precision_is_refused_with_those_there_are():
    with pytest.raises(ConfigError) as excinfo:
        check_precision("fp8")
    assert str(excinfo.value) == "precision must be one of fp32, bf16 and fp16, but is 'fp8'."


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_matrix_product_is_computed_in_the_precision(precision, dtype):
    with autocast(precision, "cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


@pytest.mark.parametrize(
    ("device", "has", "expected"),
    [
        ("cuda", {"torch.cuda.is_bf16_supported": True}, ("bf16", "the GPU multiplies in bfloat16, which needs no loss scale")),
        ("cuda", {"torch.cuda.is_bf16_supported": False}, ("fp16", "the GPU multiplies in float16 but not in bfloat16; the loss is scaled")),
        ("mps", {}, ("fp16", "Apple GPUs multiply in float16; the loss is scaled")),
        ("cpu", {"torch.cpu._is_avx512_bf16_supported": True}, ("bf16", "the processor multiplies in bfloat16")),
        ("cpu", {"torch.cpu._is_amx_tile_supported": True}, ("bf16", "the processor multiplies in bfloat16")),
        ("cpu", {}, ("fp32", "the processor has no bfloat16 arithmetic")),
    ],
)  # fmt: skip
def test_a_device_gets_the_precision_that_suits_it(monkeypatch, device, has, expected):
    asked = []

    def answers(name):
        return lambda **options: asked.append(options) or has.get(name, False)

    for name in (
        "torch.cuda.is_bf16_supported",
        "torch.cpu._is_avx512_bf16_supported",
        "torch.cpu._is_amx_tile_supported",
    ):
        monkeypatch.setattr(name, answers(name))
    assert best_precision(torch.device(device)) == expected
    if device == "cuda":  # a GPU that only emulates it would be slower
        assert asked == [{"including_emulation": False}]
