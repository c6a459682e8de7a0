"""Keys without their mean: what softmax does not see, what a cosine does, and the gradient by hand."""

from __future__ import annotations

import pytest
import torch

from castling_det.ops import (
    centered_keys,
    centered_keys_packed,
    linear_angular_attention,
    masked_softmax,
)
from tests.compare import assert_parity, errors


def packed_qkv(tokens, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + tokens)
    qkv = torch.randn(2, tokens, 3, 3, 8, generator=generator, dtype=torch.float64)
    qkv[:, :, 1] += torch.linspace(-2, 2, 8, dtype=torch.float64)
    return qkv.to(dtype)


def heads_of(qkv):
    return [x.transpose(1, 2) for x in qkv.unbind(2)]


@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_what_keys_share_is_nothing_to_softmax_and_much_to_a_cosine(tokens):
    q, k, v = heads_of(packed_qkv(tokens))
    shifted = k + torch.linspace(-3, 5, 8, dtype=torch.float64)
    for threshold in (0.0, 1.2 / tokens):
        one, other = (masked_softmax(q, centered_keys(x), v, threshold) for x in (k, shifted))
        plain = masked_softmax(q, k, v, threshold)
        for field in ("out", "kept_mass"):
            torch.testing.assert_close(getattr(one, field), getattr(plain, field), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(getattr(other, field), getattr(plain, field), rtol=1e-11, atol=1e-12)
    for normalizer in ("l2", "kernel"):
        centred = linear_angular_attention(q, centered_keys(k), v, normalizer=normalizer)
        if tokens > 1:
            again = linear_angular_attention(q, centered_keys(shifted), v, normalizer=normalizer)
            assert_parity(again, centred, rms=1e-12, maximum=1e-11)
            assert errors(linear_angular_attention(q, k, v, normalizer=normalizer), centred)[0] > 1e-3


def test_it_is_the_first_order_of_softmax():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for size, bound in ((1e-2, 2e-4), (1e-3, 2e-6)):
        softmax = torch.softmax(size * q @ (k + 1).transpose(-2, -1), dim=-1)
        first_order = (1 + size * q @ centered_keys(k + 1).transpose(-2, -1)) / 50
        assert (softmax - first_order).abs().max() < bound


@pytest.mark.parametrize("tokens", [1, 7, 400])
def test_packed_is_the_plain_one_with_its_gradients(tokens):
    qkv = packed_qkv(tokens).requires_grad_()
    q, k, v = heads_of(qkv)
    expected = torch.stack([x.transpose(1, 2) for x in (q, centered_keys(k), v)], dim=2)
    found = centered_keys_packed(qkv)
    assert_parity(found, expected, rms=1e-14, maximum=1e-13)
    weight = torch.linspace(-1, 1, qkv.numel(), dtype=torch.float64).reshape(qkv.shape)
    gradients = [torch.autograd.grad((x * weight).sum(), qkv)[0] for x in (found, expected)]
    assert_parity(*gradients, rms=1e-13, maximum=1e-12)
    if tokens == 7:
        assert torch.autograd.gradcheck(centered_keys_packed, qkv)
        assert torch.autograd.gradgradcheck(centered_keys_packed, qkv)


def test_with_gradients_the_input_stays_and_without_it_is_taken():
    qkv = packed_qkv(7).requires_grad_()
    before = qkv.detach().clone()
    centered_keys_packed(qkv)
    torch.testing.assert_close(qkv.detach(), before, rtol=0, atol=0)
    with torch.no_grad():
        own = before.clone()
        found = centered_keys_packed(own)
    assert found.data_ptr() == own.data_ptr()
    torch.testing.assert_close(found[:, :, 1].mean(dim=1), torch.zeros(2, 3, 8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_means_over_many_tokens(dtype):
    # 10,000 keys that share a mean of 8: a sum in float16 would leave its range.
    k = torch.randn(1, 1, 10_000, 4, generator=torch.Generator().manual_seed(0)) + 8
    found = centered_keys(k.to(dtype)).float()
    assert (found - centered_keys(k.double()).float()).abs().max() < 0.1
