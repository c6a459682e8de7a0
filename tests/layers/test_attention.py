"""`CastlingAttention`: equal to the published block to round-off, and to its parts in the other modes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from castling_det.layers import ATTENTION_MODES, CastlingAttention
from castling_det.ops import naive
from tests.compare import assert_parity, assert_same_gradients, errors
from tests.oracles.published import published_block


def randomised(module, seed=0):
    """Every parameter drawn anew: zero-initialised biases and convolutions hide a dropped term."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


def tokens_of(hw, dim=24, *, prefix=0, batch=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, prefix + hw[0] * hw[1], dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def published_layer(mode, threshold=0.02, **options):
    layer = CastlingAttention(24, 3, mode=mode, normalizer="l2", local_conv="tokens", threshold=threshold, **options)
    return randomised(layer.double())


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("mode", ["linear", "castling"])
@pytest.mark.parametrize("hw", [(1, 1), (1, 7), (7, 7), (3, 5)], ids=str)
def test_published_options_equal_the_published_block(hw, mode, qkv_bias):
    layer = published_layer(mode, qkv_bias=qkv_bias, threshold=0.9 / (hw[0] * hw[1]))
    x = tokens_of(hw)
    threshold = layer.mask_state.threshold if mode == "castling" else None
    parameters = dict(layer.named_parameters())
    actual = layer(x, hw)
    expected = published_block(x, parameters, 3, threshold)
    assert_parity(actual, expected, rms=1e-13, maximum=1e-12, what="out")
    assert_same_gradients(actual, expected, {"x": x, **parameters}, rms=1e-12, maximum=1e-11)


def test_negative_controls_are_seen():
    """Unpermuted qkv, a dropped convolution, a mask one step off: each must fail the comparison above."""
    layer, hw = published_layer("castling", threshold=0.9 / 15), (3, 5)
    x, parameters = tokens_of(hw), dict(layer.named_parameters())
    actual = layer(x, hw)
    unpermuted = dict(parameters)
    unpermuted["qkv.weight"] = parameters["qkv.weight"].reshape(3, 3, 8, 24).transpose(0, 1).reshape(72, 24)
    no_conv = {**parameters, "dconv.weight": torch.zeros_like(parameters["dconv.weight"])}
    for wrong, threshold in (
        (unpermuted, layer.mask_state.threshold),
        (no_conv, layer.mask_state.threshold),
        (parameters, 1.0 / 15),
    ):
        assert errors(actual, published_block(x, wrong, 3, threshold))[0] > 1e-6


def test_published_state_dict_loads_strictly():
    published = {
        "qkv.weight": torch.randn(72, 24),
        "proj.weight": torch.randn(24, 24),
        "proj.bias": torch.randn(24),
        "dconv.weight": torch.randn(3, 1, 9, 1),
    }
    CastlingAttention(24, 3, qkv_bias=False, local_conv="tokens").load_state_dict(published, strict=True)


def test_image_conv_is_depthwise_on_the_map():
    layer, hw = randomised(CastlingAttention(24, 3, mode="linear", local_conv_kernel_size=5).double()), (3, 5)
    x = tokens_of(hw)
    q, k, v = layer.qkv(x).split(24, dim=-1)
    heads = [t.reshape(2, 15, 3, 8).transpose(1, 2) for t in (q, k, v)]
    merged = naive.linear_angular_attention(*heads).transpose(1, 2).reshape(2, 15, 24)
    padded = F.pad(v.reshape(2, 3, 5, 24), (0, 0, 2, 2, 2, 2))
    conv = sum(
        padded[:, i : i + 3, j : j + 5] * layer.dconv.weight[:, 0, i, j] for i in range(5) for j in range(5)
    ).reshape(2, 15, 24)
    assert_parity(layer(x, hw), layer.proj(merged + conv), rms=1e-13, maximum=1e-12)


@pytest.mark.parametrize("hw", [(4, 6), (1, 9)], ids=str)
def test_softmax_mode_is_scaled_dot_product_attention_at_initialisation(hw):
    layer = CastlingAttention(24, 3, mode="softmax")
    x = tokens_of(hw, dtype=torch.float32)
    q, k, v = layer.qkv(x).reshape(2, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
    merged = (torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1) @ v).transpose(1, 2).reshape(2, -1, 24)
    assert_parity(layer(x, hw), layer.proj(merged), rms=1e-5, maximum=1e-4)


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize("local_conv", ["tokens", "image"])
def test_prefix_tokens(mode, local_conv):
    layer = randomised(CastlingAttention(24, 3, mode=mode, local_conv=local_conv, num_prefix_tokens=2).double())
    x, hw = tokens_of((3, 4), prefix=2), (3, 4)
    out = layer(x, hw)
    assert out.shape == (2, 14, 24)
    if local_conv == "image":  # the map's convolution neither reads nor writes the prefix
        other_prefix = torch.cat([x[:, :2] * 3, x[:, 2:]], dim=1)
        assert (layer.dconv(x, hw)[:, :2] == 0).all()
        assert torch.equal(layer.dconv(x, hw), layer.dconv(other_prefix, hw))


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_centred_keys(mode, normalizer):
    options = dict(mode=mode, normalizer=normalizer, threshold=0.02, threshold_unit="absolute")
    plain, centred = (
        randomised(CastlingAttention(24, 3, center_keys=center, **options).double()) for center in (False, True)
    )
    x = tokens_of((5, 7)) + 0.5
    found = centred(x, (5, 7))
    q, k, v = plain.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    k = k - k.mean(dim=2, keepdim=True)
    if mode == "softmax":
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        aux = naive.masked_softmax(q, k, v, 0.02) if mode == "castling" else None
        y = naive.linear_angular_attention(q, k, v, normalizer=normalizer, aux=aux)
    local = plain.dconv(v.transpose(1, 2).flatten(-2), (5, 7))
    expected = plain.proj(y.transpose(1, 2).flatten(-2) + local)
    assert_parity(found, expected, rms=1e-12, maximum=1e-11)
    assert_same_gradients(found, expected, {"x": x}, rms=1e-11, maximum=1e-10)
    far, _ = errors(plain(x, (5, 7)), expected)
    assert far < 1e-12 if mode == "softmax" else far > 1e-3
