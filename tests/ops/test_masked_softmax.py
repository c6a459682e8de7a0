"""The masked softmax branch against the dense form: values, gradients, mask statistics, memory."""

from __future__ import annotations

import math

import pytest
import torch

from castling_det.ops import masked_softmax, masked_softmax_attention, masked_softmax_packed, naive
from castling_det.ops import masked_softmax as public_masked_softmax
from tests.compare import assert_parity, errors
from tests.ops.test_linear_angular import random_qkv, value_and_gradients

module = __import__("importlib").import_module("castling_det.ops.masked_softmax")


@pytest.fixture(params=[1, 200, 1 << 22], ids=["one-row-blocks", "odd-blocks", "one-block"])
def block_elements(request, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", request.param * (50 if request.param == 200 else 1))


def packed(q, k, v, threshold):
    return masked_softmax_packed(torch.stack((q, k, v), dim=2).permute(0, 3, 2, 1, 4), threshold)


@pytest.mark.parametrize("function", [masked_softmax, packed], ids=["apart", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("multiple", [0.0, 0.7, 1.5, 4.0])
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_equals_naive_twin(tokens, multiple, dtype, function, block_elements):
    inputs = random_qkv(tokens, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    threshold = multiple / tokens * 0.999

    def both(function, tensors):
        def out_and_mass(q, k, v):
            result = function(q, k, v, threshold)
            return torch.cat([result.out, result.kept_mass.unsqueeze(-1).to(result.out.dtype)], dim=-1)

        return [*value_and_gradients(out_and_mass, tensors), function(*tensors, threshold).kept_fraction]

    bound = 1e-12 if dtype == torch.float64 else 2e-4
    fast, slow = both(function, inputs), both(naive.masked_softmax, exact)
    for what, actual, expected in zip(("out", "dq", "dk", "dv", "fraction"), fast, slow, strict=True):
        if expected.abs().max() < 1e-12:
            assert actual.abs().max() < 1e-5, what
        else:
            assert_parity(actual, expected, rms=bound, maximum=10 * bound, what=what)


@pytest.mark.parametrize("function", [masked_softmax, packed], ids=["apart", "packed"])
def test_gradcheck(function):
    q, k, v = (x.detach()[:1, :2, :5, :3].contiguous().requires_grad_() for x in random_qkv(11))
    assert torch.autograd.gradcheck(lambda *x: function(*x, 0.1)[:2], (q, k, v))


def test_negative_control_threshold_off_by_a_step():
    """One entry of 2 x 3 x 63 x 63 more or less is seen by the largest error."""
    q, k, v = (x.detach() for x in random_qkv(63))
    largest = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1).flatten().sort().values[-42:-39]
    below, above = float(largest[:2].mean()), float(largest[1:].mean())
    actual = masked_softmax(q, k, v, above).out
    assert_parity(actual, naive.masked_softmax(q, k, v, above).out, rms=1e-12, maximum=1e-11)
    assert errors(actual, naive.masked_softmax(q, k, v, below).out)[1] > 1e-3


def test_strictly_above_the_threshold_is_kept():
    q = torch.zeros(1, 1, 4, 2)
    assert masked_softmax(q, q, q, 0.25).kept_fraction == 0
    assert masked_softmax(q, q, q, 0.2499).kept_fraction == 1


@pytest.mark.parametrize("threshold", [1.0, 3.0, math.inf])
def test_from_one_on_nothing_is_kept(threshold):
    """Also for a row whose probability rounds to 1."""
    q = torch.full((1, 1, 3, 2), 100.0) * torch.eye(3)[:, :2]
    q.requires_grad_()
    result = masked_softmax(q, q, q, threshold)
    assert result.kept_fraction == 0 and (result.out == 0).all() and (result.kept_mass == 0).all()
    result.out.sum().backward()
    assert (q.grad == 0).all()


def test_public_pair():
    q, k, v = random_qkv(30)
    out, kept_fraction = masked_softmax_attention(q, k, v, 0.04, scale=0.7)
    expected, expected_fraction = naive.masked_softmax_attention(q, k, v, 0.04, scale=0.7)
    assert_parity(out, expected, rms=1e-12, maximum=1e-11)
    assert kept_fraction.shape == () and kept_fraction == expected_fraction and 0 < kept_fraction < 1


def test_no_tensor_of_n_squared_is_alive():
    """Records every tensor that autograd saves, and the peak of live bytes seen by the allocator hooks of a profile."""
    tokens = 2048
    q, k, v = (torch.randn(1, 2, tokens, 8, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = public_masked_softmax(q, k, v, 1.2 / tokens).out
    out.sum().backward()
    assert max(sizes) <= q.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    q, k, v = random_qkv(400, dtype=dtype)
    result = masked_softmax(q, k, v, 1.2 / 400)
    assert result.out.dtype == dtype and result.kept_mass.dtype == torch.float32
    expected = naive.masked_softmax(*(x.detach().double() for x in (q, k, v)), 1.2 / 400)
    assert errors(result.out, expected.out)[0] < 1e-2


@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_errors_name_the_field(threshold):
    q, k, v = random_qkv(3)
    with pytest.raises(ValueError, match="threshold="):
        masked_softmax(q, k, v, threshold)
