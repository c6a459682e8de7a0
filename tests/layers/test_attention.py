"""`CastlingAttention`: the published block to round-off, its modes, options, numerics and errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from castling_det.layers import ATTENTION_MODES, CastlingAttention
from castling_det.ops import naive
from tests.compare import assert_parity, errors
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
    weight = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)

    actual = layer(x, hw)
    expected = published_block(x, parameters, 3, threshold)
    assert_parity(actual, expected, rms=1e-13, maximum=1e-12, what="out")
    wanted = [x, *parameters.values()]
    actual_gradients = torch.autograd.grad((actual * weight).sum(), wanted)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), wanted)
    for name, one, other in zip(["x", *parameters], actual_gradients, expected_gradients, strict=True):
        if other.abs().max() < 1e-12:
            assert one.abs().max() < 1e-12, name
        else:
            assert_parity(one, other, rms=1e-12, maximum=1e-11, what=name)


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


@pytest.mark.parametrize("local_conv", ["tokens", "image", None])
def test_modes_share_their_parameter_names(local_conv):
    states = [CastlingAttention(24, 3, mode=mode, local_conv=local_conv).state_dict() for mode in ATTENTION_MODES]
    assert all({k: v.shape for k, v in s.items()} == {k: v.shape for k, v in states[0].items()} for s in states)


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


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
def test_eval_computes_what_is_deployed(normalizer):
    options = dict(normalizer=normalizer, threshold=0.9, threshold_unit="uniform")
    castling = randomised(CastlingAttention(24, 3, mode="castling", **options))
    linear = CastlingAttention(24, 3, mode="linear", normalizer=normalizer)
    linear.load_state_dict(castling.state_dict())
    x, hw = tokens_of((4, 5), dtype=torch.float32), (4, 5)
    hybrid = castling.train()(x, hw)
    deployed = castling.eval()(x, hw)
    assert torch.equal(deployed, linear.eval()(x, hw))
    assert errors(hybrid, deployed)[0] > 1e-3
    castling.eval_aux = True
    assert torch.equal(castling(x, hw), hybrid)
    castling.mask_state = replace(castling.mask_state, threshold=20.0)
    assert torch.equal(castling.train()(x, hw), linear.train()(x, hw))


def test_mask_statistics():
    layer = randomised(CastlingAttention(24, 3, threshold=1.1, threshold_unit="uniform").double())
    x, hw = tokens_of((4, 5)), (4, 5)
    layer(x, hw)
    q, k, _ = layer.qkv(x).reshape(2, 20, 3, 3, 8).permute(2, 0, 3, 1, 4)
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1)
    kept = p > 1.1 / 20
    assert 0 < layer.mask_stats.kept_fraction < 1
    torch.testing.assert_close(layer.mask_stats.kept_fraction, kept.double().mean().float())
    torch.testing.assert_close(layer.mask_stats.kept_mass, (p * kept).sum(-1).mean().float())
    layer.mask_state = replace(layer.mask_state, aux_scale=0.0)
    layer(x, hw)
    assert layer.mask_stats == (0, 0)


def test_uniform_unit_means_the_same_at_every_resolution():
    layer = CastlingAttention(24, 3, threshold=2.0, threshold_unit="uniform")
    assert layer.mask_state.absolute(100) == 0.02 and layer.mask_state.absolute(1600) == 2 / 1600
    assert layer.mask_state.is_empty(2) and not layer.mask_state.is_empty(3)


def test_fade_scales_the_branch():
    layer = randomised(CastlingAttention(24, 3, threshold=0.0).double())
    x, hw = tokens_of((3, 3)), (3, 3)
    full = layer(x, hw)
    layer.mask_state = replace(layer.mask_state, aux_scale=0.5)
    half = layer(x, hw)
    layer.mask_state = replace(layer.mask_state, aux_scale=0.0)
    none = layer(x, hw)
    assert errors(full, half)[0] > 1e-4 and errors(half, none)[0] > 1e-4
    assert torch.equal(none, layer.eval()(x, hw))


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


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize("local_conv", ["tokens", "image"])
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
def test_every_parameter_receives_a_gradient(mode, local_conv, normalizer):
    layer = CastlingAttention(24, 3, mode=mode, local_conv=local_conv, normalizer=normalizer, threshold=0.02)
    x = tokens_of((4, 4), dtype=torch.float32)
    (layer(x, (4, 4)) * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ["linear", "castling"])
def test_autocast_and_zero_tokens(mode, normalizer):
    layer = CastlingAttention(64, 2, mode=mode, normalizer=normalizer, qkv_bias=False)
    x = torch.randn(1, 1600, 64) + 1
    x[:, 1000:] = 0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, (40, 40))
        out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=5), r"num_heads=5: expected a divisor of dim=24"),
        (dict(num_heads=0), r"num_heads=0"),
        (dict(mode="cast"), r"mode='cast': expected one of 'softmax', 'linear', 'castling'"),
        (dict(normalizer="l1"), r"normalizer='l1': expected one of"),
        (dict(local_conv="2d"), r"local_conv='2d': expected one of"),
        (dict(local_conv_kernel_size=4), r"local_conv_kernel_size=4: expected an odd"),
        (dict(threshold=-1), r"threshold=-1"),
        (dict(threshold=math.nan), r"threshold=nan"),
        (dict(threshold_unit="rows"), r"threshold_unit='rows': expected one of"),
        (dict(mode="linear", eval_aux=True), r"eval_aux=True: only mode='castling'"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        CastlingAttention(24, **{"num_heads": 3, **options})


def test_wrong_hw_is_refused():
    with pytest.raises(ValueError, match=r"x: expected \(B, 4 \* 4, 24\)"):
        CastlingAttention(24, 3)(torch.zeros(1, 15, 24), (4, 4))


def test_macs_of_the_deployed_forward():
    softmax, linear = (CastlingAttention(24, 3, mode=mode).macs(100) for mode in ("softmax", "linear"))
    assert softmax == dict(attention_scores=240_000, attention_values=240_000, projections=230_400, local_conv=21_600)
    assert linear == dict(attention_scores=19_200, attention_values=19_200, projections=230_400, local_conv=21_600)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_centred_keys(mode, normalizer, grad):
    options = dict(mode=mode, normalizer=normalizer, threshold=0.02, threshold_unit="absolute")
    plain, centred = (
        randomised(CastlingAttention(24, 3, center_keys=center, **options).double()) for center in (False, True)
    )
    x = tokens_of((5, 7)) + 0.5
    with torch.set_grad_enabled(grad):
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
    far, _ = errors(plain(x, (5, 7)), expected)
    assert far < 1e-12 if mode == "softmax" else far > 1e-3
