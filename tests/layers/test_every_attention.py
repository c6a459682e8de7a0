"""Behaviour that the attentions of all backbones share: modes, mask, centred keys, half precision, cost, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from castling_det.layers import (
    ATTENTION_MODES,
    AttentionOptions,
    CastlingAttention,
    LevitAttention,
    MaskState,
    PooledAttention,
)
from castling_det.ops import NORMALIZERS
from tests.compare import errors
from tests.layers.test_attention import tokens_of
from tests.layers.test_levit import randomised

DIM, HW = 24, (6, 8)
LAYERS = {
    "vit": lambda **options: CastlingAttention(DIM, 3, **options),
    "levit": lambda **options: LevitAttention(DIM, DIM, key_dim=4, num_heads=3, resolution=5, **options),
    "levit, fewer q": lambda **options: LevitAttention(DIM, 16, key_dim=4, num_heads=3, query_stride=2, **options),
    "mvit, fewer k": lambda **options: PooledAttention(DIM, 3, stride_kv=4, **options),
    "mvit, fewer q": lambda **options: PooledAttention(DIM, 3, dim_out=36, stride_q=2, **options),
}
SOFTMAX_ONLY = {"attention_biases", "rel_pos_h", "rel_pos_w"}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer_of(name, dtype=torch.float64, **options):
    """Random weights and statistics; BatchNorm in eval mode, so that layers can be compared."""
    return randomised(LAYERS[name](**options)).to(dtype).eval()


def output(layer, x, hw=HW):
    out = layer(x, hw)
    return out[0] if isinstance(out, tuple) else out


def hybrid_output(layer, x):
    """As in training, but for BatchNorm, which stays in eval mode."""
    layer.training = True
    out = output(layer, x)
    layer.training = False
    return out


@every_layer
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_eval_computes_what_is_deployed(name, normalizer):
    options = dict(normalizer=normalizer, threshold=1.05, threshold_unit="uniform")
    castling, linear = (layer_of(name, mode=mode, **options) for mode in ("castling", "linear"))
    x = tokens_of(HW, DIM)
    hybrid, deployed = hybrid_output(castling, x), output(castling, x)
    assert torch.equal(deployed, output(linear, x))
    assert errors(hybrid, deployed)[0] > 1e-4
    castling.eval_aux = True
    assert torch.equal(output(castling, x), hybrid)
    castling.mask_state = MaskState(48.0, "uniform")
    assert torch.equal(output(castling, x), deployed)


@every_layer
@pytest.mark.parametrize(("batch", "hw"), [(0, (4, 6)), (2, (0, 6)), (1, (0, 0))])
def test_nothing_to_attend_to_is_one_clear_error(name, batch, hw):
    layer = layer_of(name, mode="castling")
    with pytest.raises(ValueError, match=rf"x: expected at least one image and one token, got \({batch}, "):
        layer(torch.zeros(batch, hw[0] * hw[1], DIM), hw)
    assert layer.mask_stats is None


@every_layer
def test_the_mask_counts_keys_and_fades(name):
    layer, x = layer_of(name, threshold=1.02, threshold_unit="uniform"), tokens_of(HW, DIM)
    assert layer.mask_stats is None
    full = hybrid_output(layer, x)
    q, k, *_ = layer.head_inputs(x, HW)
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    kept = p > 1.02 / k.shape[2]
    assert 0 < layer.mask_stats.kept_fraction < 1
    torch.testing.assert_close(layer.mask_stats.kept_fraction, kept.double().mean().float())
    torch.testing.assert_close(layer.mask_stats.kept_mass, (p * kept).sum(-1).mean().float())
    outs = [full]
    for scale in (0.5, 0.0):
        layer.mask_state = replace(layer.mask_state, aux_scale=scale)
        outs.append(hybrid_output(layer, x))
    assert errors(outs[0], outs[1])[0] > 1e-5 and errors(outs[1], outs[2])[0] > 1e-5
    assert torch.equal(outs[2], output(layer, x)) and layer.mask_stats == (0, 0)


@every_layer
@pytest.mark.parametrize("local_conv", ["tokens", "image", None])
def test_modes_share_their_parameters(name, local_conv):
    shapes = {
        mode: {key: value.shape for key, value in LAYERS[name](mode=mode, local_conv=local_conv).state_dict().items()}
        for mode in ATTENTION_MODES
    }
    assert shapes["linear"] == shapes["castling"] and shapes["linear"].items() <= shapes["softmax"].items()
    assert shapes["softmax"].keys() - shapes["linear"].keys() <= SOFTMAX_ONLY


@every_layer
def test_softmax_starts_without_the_local_convolution(name):
    with_conv, without = (LAYERS[name](mode="softmax", local_conv=kind) for kind in ("image", None))
    without.load_state_dict({key: value for key, value in with_conv.state_dict().items() if "dconv" not in key})
    x = tokens_of(HW, DIM, dtype=torch.float32)
    assert torch.equal(output(with_conv, x), output(without, x))


@every_layer
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_keys_lose_their_mean_where_a_cosine_sees_it(name, mode):
    plain, centred = (layer_of(name, mode=mode, center_keys=center) for center in (False, True))
    x = (tokens_of(HW, DIM) + 0.5).detach()
    before, after = (layer.head_inputs(x, HW).k for layer in (plain, centred))
    far, _ = errors(output(centred, x), output(plain, x))
    if mode == "softmax":
        assert torch.equal(after, before) and far == 0
        return
    torch.testing.assert_close(after, before - before.mean(dim=2, keepdim=True), rtol=1e-12, atol=1e-12)
    assert far > 1e-3
    with torch.no_grad():
        assert torch.equal(output(centred, x), output(centred, x.requires_grad_()))


@every_layer
@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize("local_conv", ["tokens", "image"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_parameter_receives_a_gradient(name, mode, local_conv, normalizer):
    layer = layer_of(name, torch.float32, mode=mode, local_conv=local_conv, normalizer=normalizer).train()
    out = output(layer, tokens_of(HW, DIM, dtype=torch.float32))
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@every_layer
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_autocast_and_zero_tokens(name, mode, normalizer):
    layer = LAYERS[name](mode=mode, normalizer=normalizer)
    x = torch.randn(1, 40 * 40, DIM) + 1
    x[:, 1000:] = 0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = output(layer, x, (40, 40))
        out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@every_layer
@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize(("mode", "normalizer"), [("softmax", "l2"), ("linear", "l2"), ("castling", "kernel")])
def test_cost_is_the_closed_form(name, mode, normalizer, local_conv):
    """q k^T and p v cost M N (K + V) a head, k^T v and q (k^T v) cost (M + N) K V: linear in the tokens."""
    layer = layer_of(name, torch.float32, mode=mode, normalizer=normalizer, local_conv=local_conv)
    x = tokens_of(HW, DIM, dtype=torch.float32).detach()
    inputs = layer.head_inputs(x, HW)
    queries, keys, (key_dim, value_dim) = inputs.q.shape[2], inputs.k.shape[2], (inputs.q.shape[3], inputs.v.shape[3])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        output(layer, x)
    counted = {str(operator): count for operator, count in flops.get_flop_counts()["Global"].items()}
    if mode == "softmax":
        products = queries * keys * (key_dim + value_dim)
        if isinstance(layer, PooledAttention):  # decomposed positions
            products += queries * sum(inputs.key_hw) * key_dim
    else:
        products = (queries + keys) * key_dim * value_dim + (queries + keys) * key_dim * (normalizer == "kernel")
    attention = sum(count for operator, count in counted.items() if "bmm" in operator)
    assert attention == 2 * 2 * layer.num_heads * products


@every_layer
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="cast"), r"mode='cast': expected one of 'softmax', 'linear', 'castling'"),
        (dict(normalizer="l1"), r"normalizer='l1': expected one of"),
        (dict(local_conv="2d"), r"local_conv='2d': expected one of 'tokens', 'image' or None"),
        (dict(local_conv_kernel_size=4), r"local_conv_kernel_size=4: expected an odd"),
        (dict(threshold=-1), r"threshold=-1: expected a number >= 0"),
        (dict(threshold=math.nan), r"threshold=nan"),
        (dict(threshold_unit="rows"), r"threshold_unit='rows': expected one of"),
        (dict(mode="linear", eval_aux=True), r"eval_aux=True: only mode='castling'"),
    ],
)
def test_errors_name_the_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        LAYERS[name](**options)


@every_layer
def test_options_are_one_object_or_names(name):
    options = AttentionOptions(mode="linear", normalizer="kernel", threshold=0.5)
    assert LAYERS[name](options=options).options == options
    assert LAYERS[name](mode="linear", normalizer="kernel", threshold=0.5).options == options
    assert LAYERS[name](options=options, threshold=0.7).options == replace(options, threshold=0.7)
    with pytest.raises(TypeError, match="treshold"):
        LAYERS[name](treshold=0.5)
    assert "normalizer='kernel'" in repr(LAYERS[name](options=options))


@every_layer
def test_wrong_hw_is_refused(name):
    with pytest.raises(ValueError, match=r"x: expected \(B, 4 \* 4, 24\)"):
        LAYERS[name]()(torch.zeros(1, 15, DIM), (4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CastlingAttention(24, 5), r"num_heads=5: expected a divisor of dim=24"),
        (lambda: CastlingAttention(24, 0), r"num_heads=0"),
        (lambda: LevitAttention(24, 24, key_dim=4, num_heads=0), r"num_heads=0.*expected positive"),
        (lambda: PooledAttention(24, 5), r"num_heads=5: expected a divisor of dim_out=24"),
        (lambda: PooledAttention(24, 3, stride_q=2, stride_kv=3), r"stride_q=2, stride_kv=3: expected positive"),
        (lambda: PooledAttention(24, 3, stride_q=0), r"stride_q=0"),
    ],
)
def test_errors_name_the_size(make, message):
    with pytest.raises(ValueError, match=message):
        make()
