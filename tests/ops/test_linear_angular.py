"""`linear_angular_attention` against its naive twin and the oracle: values, every gradient, precision, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from castling_det.ops import (
    NORMALIZERS,
    MaskedSoftmax,
    linear_angular_attention,
    linear_angular_packed,
    masked_softmax,
    masked_softmax_packed,
    naive,
)
from tests.compare import assert_parity, errors
from tests.oracles.published import published_attention

BOUNDS = {torch.float64: (1e-13, 1e-12), torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 6e-2)}


def random_qkv(tokens, *, dtype=torch.float64, batch=2, heads=3, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed + tokens)
    # A shared mean, as tokens of a real image have it: the published sum grows with N only then.
    shape = (3, batch, heads, tokens, channels)
    stacked = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    return [x.to(dtype).clone().requires_grad_() for x in stacked]


def value_and_gradients(function, inputs):
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("tokens", [1, 7, 49, 63, 400])
def test_equals_naive_twin(tokens, normalizer, dtype):
    inputs = random_qkv(tokens, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    fast = value_and_gradients(lambda *x: linear_angular_attention(*x, normalizer=normalizer), inputs)
    slow = value_and_gradients(lambda *x: naive.linear_angular_attention(*x, normalizer=normalizer), exact)
    rms, maximum = BOUNDS[dtype]
    if dtype == torch.bfloat16:
        fast, slow = fast[:1], slow[:1]  # gradients in bfloat16 are bounded below, in float32 accumulation
    for what, actual, expected in zip(("out", "dq", "dk", "dv"), fast, slow, strict=False):
        if expected.abs().max() < 1e-12:  # N = 1, "kernel": a constant, whose gradient is exactly zero
            assert actual.abs().max() < (1e-12 if dtype == torch.float64 else 1e-5), what
        else:
            assert_parity(actual, expected, rms=rms, maximum=maximum, what=what)


@pytest.mark.parametrize("tokens", [1, 7, 49])
def test_naive_twin_equals_oracle(tokens):
    q, k, v = random_qkv(tokens)
    assert_parity(naive.linear_angular_attention(q, k, v), published_attention(q, k, v, None), rms=1e-14, maximum=1e-13)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_hybrid_equals_naive_twin(normalizer):
    inputs = random_qkv(63)
    threshold = 1.2 / 63
    fast = value_and_gradients(
        lambda *x: linear_angular_attention(*x, normalizer=normalizer, aux=masked_softmax(*x, threshold)),
        inputs,
    )
    slow = value_and_gradients(
        lambda *x: naive.linear_angular_attention(*x, normalizer=normalizer, aux=naive.masked_softmax(*x, threshold)),
        inputs,
    )
    for what, actual, expected in zip(("out", "dq", "dk", "dv"), fast, slow, strict=True):
        assert_parity(actual, expected, rms=1e-12, maximum=1e-11, what=what)


def test_negative_control_dropped_branch_is_seen():
    q, k, v = random_qkv(63)
    rms, _ = errors(linear_angular_attention(q, k, v), published_attention(q, k, v, 1.2 / 63))
    assert rms > 1e-4


def test_kernel_weights_are_a_convex_average():
    q, k, _ = random_qkv(50)
    identity = torch.eye(50, dtype=torch.float64).expand(2, 3, 50, 50)
    # Values of width N read the weights out; q and k are padded with zero channels, which no cosine sees.
    q, k = (torch.nn.functional.pad(x, (0, 42)) for x in (q, k))
    weights = linear_angular_attention(q, k, identity, normalizer="kernel")
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 50, dtype=torch.float64))
    assert weights.min() > (0.5 - 1 / math.pi) / (50 * (0.5 + 1 / math.pi))


def test_kernel_hybrid_is_convex_and_constant_values_stay():
    q, k, _ = random_qkv(40)
    v = torch.ones(2, 3, 40, 8, dtype=torch.float64) * 2.5
    for threshold in (0.0, 1 / 40, 0.1, 1.0):
        out = linear_angular_attention(q, k, v, normalizer="kernel", aux=masked_softmax(q, k, v, threshold))
        torch.testing.assert_close(out, v)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [196, 1600, 16384])
def test_half_precision_stays_finite(tokens, dtype, normalizer):
    """Tokens that share a mean: the published squared norm leaves float16 from N = 1600 on."""
    q, k, v = (x.detach() + 2 for x in random_qkv(tokens, dtype=torch.float32, batch=1, heads=2, channels=32))
    exact = linear_angular_attention(q.double(), k.double(), v.double(), normalizer=normalizer)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = linear_angular_attention(q, k, v, normalizer=normalizer)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(bool(x.isfinite().all()) for x in (out, q.grad, k.grad, v.grad))
    assert errors(out, exact)[0] < (2e-3 if dtype == torch.float16 else 1.5e-2)


def test_published_formula_overflows_half_precision():
    """The negative control of the 1/N scaling: without it the squared norm is infinite in float16."""
    q, k, v = (x.detach() + 2 for x in random_qkv(1600, dtype=torch.float32, batch=1, heads=2, channels=32))
    cosine = torch.nn.functional.normalize(q, dim=-1) @ (torch.nn.functional.normalize(k, dim=-1).transpose(-2, -1) @ v)
    assert (v / 2 + cosine / math.pi).half().square().sum(dim=-1, dtype=torch.float16).isinf().any()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_zero_tokens_give_neither_nan_nor_exploding_gradient(normalizer):
    q, k, v = (x.detach().float() for x in random_qkv(20))
    for x in (q, k, v):
        x[:, :, 15:] = 0
        x.requires_grad_()
    out = linear_angular_attention(q, k, v, normalizer=normalizer)
    out.sum().backward()
    assert out.isfinite().all()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and x.grad.abs().max() < 1e3
    zero = torch.zeros(1, 1, 4, 8)
    assert (linear_angular_attention(zero, zero, zero, normalizer=normalizer) == 0).all()


def test_accumulates_in_float32_under_autocast():
    q, k, v = (x.detach().float() for x in random_qkv(400))
    expected = linear_angular_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = linear_angular_attention(q, k, v)
    assert torch.equal(actual, expected)


THRESHOLD = 1.2
"""Of a uniform row: some probabilities of random tokens are above it, some below."""


def packed_by_twin(qkv, *, normalizer, hybrid, local):
    q, k, v = (x.transpose(1, 2).double() for x in qkv.unbind(2))
    aux = naive.masked_softmax(q, k, v, THRESHOLD / q.shape[2]) if hybrid else None
    out = naive.linear_angular_attention(q, k, v, normalizer=normalizer, aux=aux)
    if local is not None:
        out = out + local(v.transpose(1, 2)).transpose(1, 2)
    return out.transpose(1, 2)


def packed(qkv, *, normalizer, hybrid, local):
    aux = masked_softmax_packed(qkv, THRESHOLD / qkv.shape[1]) if hybrid else None
    return linear_angular_packed(qkv, normalizer=normalizer, aux=aux, local=local)


def packed_qkv(tokens, **options):
    return torch.stack(random_qkv(tokens, **options), dim=3).permute(0, 2, 3, 1, 4).detach().clone().requires_grad_()


@pytest.mark.parametrize("local", [None, lambda v: v.roll(1, dims=1) * 0.7], ids=["alone", "local"])
@pytest.mark.parametrize("hybrid", [False, True], ids=["linear", "hybrid"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 63])
def test_packed_equals_naive_twin(tokens, dtype, normalizer, hybrid, local):
    options = dict(normalizer=normalizer, hybrid=hybrid, local=local)
    qkv = packed_qkv(tokens, dtype=dtype)
    exact = qkv.detach().double().requires_grad_()
    fast = value_and_gradients(lambda x: packed(x, **options), [qkv])
    slow = value_and_gradients(lambda x: packed_by_twin(x, **options), [exact])
    with torch.no_grad():
        deployed = packed(qkv, **options)
    assert deployed.dtype == fast[0].dtype == dtype
    rms, maximum = BOUNDS[dtype]
    assert_parity(deployed, slow[0], rms=rms, maximum=maximum, what="out without gradients")
    names = ("out", "dqkv") if dtype != torch.bfloat16 else ("out",)
    for what, actual, expected in zip(names, fast, slow, strict=False):
        assert_parity(actual, expected, rms=10 * rms, maximum=10 * maximum, what=what)


@pytest.mark.parametrize("hybrid", [False, True], ids=["linear", "hybrid"])
def test_gradient_by_hand_in_half_precision_is_accumulated_in_float32(hybrid):
    """It equals the gradient in float32 of the same bfloat16 inputs, but for the one rounding of its result."""
    qkv = packed_qkv(49, dtype=torch.bfloat16)
    options = dict(normalizer="l2", hybrid=hybrid, local=None)
    weight = torch.linspace(-1, 1, 49 * 2 * 24).reshape(2, 49, 3, 8).bfloat16()
    (actual,) = torch.autograd.grad((packed(qkv, **options) * weight).sum(), qkv)
    exact = qkv.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((packed_by_twin(exact, **options) * weight.double()).sum(), exact)
    assert_parity(actual, expected, rms=4e-3, maximum=6e-2)


def test_gradient_by_hand_passes_gradcheck():
    qkv = packed_qkv(5, batch=1, heads=2, channels=3)
    aux = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)

    def function(qkv, aux):
        branch = MaskedSoftmax(aux, aux[..., 0], aux.sum())
        return linear_angular_packed(qkv, aux=branch, local=torch.sin)

    assert torch.autograd.gradcheck(function, (qkv, aux))


def test_gradient_by_hand_of_zero_tokens():
    qkv = packed_qkv(12, dtype=torch.float32)
    with torch.no_grad():
        qkv[:, 8:] = 0
        qkv[:, 0, 0] = 0
        qkv[:, 1, 1] = 0
    out = linear_angular_packed(qkv)
    out.sum().backward()
    assert out.isfinite().all() and (out[:, 8:] == 0).all()
    assert qkv.grad.isfinite().all() and qkv.grad.abs().max() < 1e3


def test_gradient_by_hand_is_the_one_of_the_formula_under_a_tracer():
    qkv = packed_qkv(9, dtype=torch.float32)
    traced = torch.jit.trace(lambda x: linear_angular_packed(x, local=torch.sin), qkv, check_trace=False)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(qkv), linear_angular_packed(qkv, local=torch.sin))


def test_errors_name_the_field():
    q, k, v = random_qkv(4)
    with pytest.raises(ValueError, match=r"normalizer='l1': expected one of 'l2', 'kernel'"):
        linear_angular_attention(q, k, v, normalizer="l1")
    with pytest.raises(ValueError, match=r"normalizer='l1': expected one of 'l2', 'kernel'"):
        linear_angular_packed(packed_qkv(4), normalizer="l1")
    with pytest.raises(ValueError, match="one common shape"):
        linear_angular_attention(q, k[:, :, :2], v)
