"""Fingerprints tell tensors apart by shape, dtype, name and values, and cost little."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from steploop.runs.fingerprints import fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES), st.integers(0, 99))
def test_equal_tensors_have_equal_ones_whatever_their_strides(shape, dtype, seed):
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    strided = values.t().contiguous().t() if values.dim() == 2 else values.clone()
    assert fingerprint([("x", values)]) == fingerprint([("x", strided)])
    assert fingerprint([("x", values)]) != fingerprint([("y", values)])
    if values.numel():
        other = values.clone().reshape(-1)
        other[-1] = not other[-1] if dtype is torch.bool else other[-1] + 1
        assert fingerprint([("x", values)]) != fingerprint([("x", other.reshape(shape))])
        assert fingerprint([("x", values)]) != fingerprint([("x", values.reshape(-1, 1, 1, 1, 1))])


def test_any_value_of_a_small_tensor_counts_and_some_of_a_large_one():
    small, large = torch.zeros(1000), torch.zeros(1_000_000)
    for n in range(1000):
        small[n] = 1
        assert fingerprint([("", small)]) != fingerprint([("", torch.zeros(1000))])
        small[n] = 0
    other = large.clone()
    other[500_000:] = 1
    assert fingerprint([("", large)]) != fingerprint([("", other)])
