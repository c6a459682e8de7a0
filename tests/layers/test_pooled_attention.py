"""`PooledAttention`: the linear forms against the equations for every relation of the grids, modes, mask, MACs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from castling_det.layers import ATTENTION_MODES, PooledAttention
from castling_det.layers.mvit import relative_position_logits
from castling_det.ops import naive
from castling_det.report.complexity import count_macs
from tests.compare import assert_parity, errors
from tests.layers.test_attention import randomised, tokens_of

DIM, DIM_OUT, HEADS = 12, 24, 3
# More queries than values, as many, fewer; a map that no stride divides; a single cell.
GRIDS = [((8, 12), 1, 4), ((8, 12), 2, 2), ((8, 12), 2, 1), ((7, 9), 1, 4), ((7, 9), 2, 1), ((1, 1), 2, 1)]
grids = pytest.mark.parametrize(("hw", "stride_q", "stride_kv"), GRIDS, ids=str)


def layer_of(mode, stride_q=1, stride_kv=1, **options):
    options = dict(dim_out=DIM_OUT, mode=mode, stride_q=stride_q, stride_kv=stride_kv, grid=(8, 8)) | options
    return randomised(PooledAttention(DIM, HEADS, **options).double())


def pooled(tokens, hw, conv, norm):
    """(B, N, C) to (B, H, M, K) and the grid, a head at a time."""
    heads = []
    for head in tokens.chunk(HEADS, dim=-1):
        image = head.transpose(1, 2).reshape(len(tokens), -1, *hw)
        image = F.conv2d(image, conv.weight, stride=conv.stride, padding=1, groups=image.shape[1])
        heads.append(F.layer_norm(image.permute(0, 2, 3, 1), image.shape[1:2], norm.weight, norm.bias, norm.eps))
    grid = tuple(heads[0].shape[1:3])
    return torch.stack(heads, dim=1).flatten(2, 3), grid


def at_queries(values, kv_hw, q_hw, stride_q, stride_kv):
    """(B, N, C) on the values' grid to (B, M, C), query by query."""
    image = values.reshape(len(values), *kv_hw, -1)
    rows = []
    for y in range(q_hw[0]):
        for x in range(q_hw[1]):
            # What the query covers, in places of the map before pooling, and the values' cells that overlap it.
            top, left, bottom, right = (place * stride_q for place in (y, x, y + 1, x + 1))
            cells = image[:, top // stride_kv : -(-bottom // stride_kv), left // stride_kv : -(-right // stride_kv)]
            rows.append(cells.flatten(1, 2).mean(dim=1))
    return torch.stack(rows, dim=1)


def split(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge(x):
    return x.transpose(1, 2).flatten(-2)


def reference(layer, x, hw, threshold=None, transposed=False):
    """The linear and hybrid forms from the equations, N x N."""
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    q, q_hw = pooled(q, hw, layer.pool_q, layer.norm_q)
    k, kv_hw = pooled(k, hw, layer.pool_k, layer.norm_k)
    v, _ = pooled(v, hw, layer.pool_v, layer.norm_v)

    def bring(values):
        if transposed:
            values = values.unflatten(1, kv_hw).transpose(1, 2).flatten(1, 2)
        return at_queries(values, kv_hw, q_hw, layer.stride_q, layer.stride_kv)

    cosine = F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1, eps=0)
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    sparse = p * (p > threshold) if threshold is not None else torch.zeros_like(p)
    if layer.options.normalizer == "l2":
        total = split(bring(merge(v))) / 2 + cosine @ v / math.pi + sparse @ v
        y = total / total.norm(dim=-1, keepdim=True)
    else:
        similarity = 0.5 + cosine / math.pi
        weights = similarity / similarity.sum(dim=-1, keepdim=True) + sparse
        y = weights @ v / weights.sum(dim=-1, keepdim=True)
    image = merge(v).transpose(1, 2).reshape(len(x), -1, *kv_hw)
    local = F.conv2d(image, layer.dconv.weight, padding=1, groups=image.shape[1]).flatten(2).transpose(1, 2)
    return layer.proj(merge(y + q) + bring(local))


@grids
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ["linear", "castling"])
def test_equals_the_equations(mode, normalizer, hw, stride_q, stride_kv):
    num_keys = -(-hw[0] // stride_kv) * -(-hw[1] // stride_kv)
    layer = layer_of(mode, stride_q, stride_kv, normalizer=normalizer, threshold=0.99, threshold_unit="uniform")
    x = tokens_of(hw, DIM)
    parameters = dict(layer.named_parameters())

    actual, _ = layer(x, hw)
    expected = reference(layer, x, hw, 0.99 / num_keys if mode == "castling" else None)
    assert_parity(actual, expected, rms=1e-12, maximum=1e-11, what="out")
    weight = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).reshape(actual.shape)
    wanted = [x, *parameters.values()]
    actual_gradients = torch.autograd.grad((actual * weight).sum(), wanted)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), wanted)
    for name, one, other in zip(["x", *parameters], actual_gradients, expected_gradients, strict=True):
        if other.abs().max() < 1e-12:
            assert one.abs().max() < 1e-10, name
        else:
            assert_parity(one, other, rms=1e-11, maximum=1e-10, what=name)


@pytest.mark.parametrize(("stride_q", "stride_kv"), [(1, 4), (2, 1)])
def test_a_transposed_grid_is_seen(stride_q, stride_kv):
    layer, hw = layer_of("linear", stride_q, stride_kv), (8, 8)
    x = tokens_of(hw, DIM)
    assert errors(layer(x, hw)[0], reference(layer, x, hw, transposed=True))[0] > 1e-3


def test_equal_grids_are_the_published_formula():
    layer, hw = layer_of("linear", 2, 2), (6, 10)
    x = tokens_of(hw, DIM)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    (q, grid), (k, _), (v, _) = (
        pooled(t, hw, getattr(layer, f"pool_{n}"), getattr(layer, f"norm_{n}"))
        for n, t in zip("qkv", (q, k, v), strict=True)
    )
    y = merge(naive.linear_angular_attention(q, k, v) + q) + layer.dconv(merge(v), grid)
    assert_parity(layer(x, hw)[0], layer.proj(y), rms=1e-12, maximum=1e-11)


@pytest.mark.parametrize("query_hw, key_hw", [((6, 4), (3, 2)), ((3, 2), (6, 4)), ((5, 5), (5, 5))], ids=str)
def test_relative_positions_are_distances_on_the_finer_grid(query_hw, key_hw):
    """A table of one-hot vectors tells which distance each pair of places took."""
    longest = 2 * max(query_hw[0], key_hw[0], query_hw[1], key_hw[1]) - 1
    tables = [torch.eye(2 * max(a, b) - 1, longest) for a, b in zip(query_hw, key_hw, strict=True)]
    numbers = torch.arange(longest, dtype=torch.float32)
    q = numbers.repeat(1, 1, query_hw[0] * query_hw[1], 1)
    logits = relative_position_logits(q, query_hw, key_hw, *tables).reshape(*query_hw, *key_hw)
    for y in range(query_hw[0]):
        for x in range(query_hw[1]):
            for row in range(key_hw[0]):
                for column in range(key_hw[1]):
                    expected = 0
                    for a, b, n_q, n_k in ((y, row, query_hw[0], key_hw[0]), (x, column, query_hw[1], key_hw[1])):
                        fine = max(n_q, n_k)
                        expected += a * fine // n_q - b * fine // n_k + (n_k - 1) * fine // n_k
                    assert logits[y, x, row, column] == expected


def test_modes_share_their_parameters():
    shapes = {mode: {k: v.shape for k, v in layer_of(mode, 1, 2).state_dict().items()} for mode in ATTENTION_MODES}
    assert shapes["linear"] == shapes["castling"]
    assert shapes["softmax"].keys() - shapes["linear"].keys() == {"rel_pos_h", "rel_pos_w"}
    assert shapes["linear"].items() <= shapes["softmax"].items()


@grids
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
def test_eval_computes_what_is_deployed(normalizer, hw, stride_q, stride_kv):
    options = dict(normalizer=normalizer, threshold=0.9, threshold_unit="uniform")
    castling, linear = (layer_of(mode, stride_q, stride_kv, **options) for mode in ("castling", "linear"))
    x = tokens_of(hw, DIM)
    hybrid, deployed = castling.train()(x, hw)[0], castling.eval()(x, hw)[0]
    assert torch.equal(deployed, linear(x, hw)[0])
    if hw != (1, 1):  # of one value, every normalised sum is the same
        assert errors(hybrid, deployed)[0] > 1e-4
    castling.eval_aux = True
    assert torch.equal(castling(x, hw)[0], hybrid)
    castling.mask_state = replace(castling.mask_state, threshold=96.0)
    assert torch.equal(castling.train()(x, hw)[0], linear(x, hw)[0])


@pytest.mark.parametrize(("stride_q", "stride_kv"), [(1, 4), (2, 1)])
def test_mask_counts_keys(stride_q, stride_kv):
    layer, hw = layer_of("castling", stride_q, stride_kv, threshold=1.05, threshold_unit="uniform"), (8, 12)
    x = tokens_of(hw, DIM)
    layer(x, hw)
    q, k, _ = layer.qkv(x).chunk(3, dim=-1)
    q, k = pooled(q, hw, layer.pool_q, layer.norm_q)[0], pooled(k, hw, layer.pool_k, layer.norm_k)[0]
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1)
    kept = p > 1.05 / k.shape[2]
    assert 0 < layer.mask_stats.kept_fraction < 1
    torch.testing.assert_close(layer.mask_stats.kept_fraction, kept.double().mean().float())
    torch.testing.assert_close(layer.mask_stats.kept_mass, (p * kept).sum(-1).mean().float())
    assert layer.mask_state.is_empty(1) and not layer.mask_state.is_empty(2)
    layer.mask_state = replace(layer.mask_state, aux_scale=0.0)
    layer(x, hw)
    assert layer.mask_stats == (0, 0) and layer.mask_state.is_empty(96)


def test_fade_scales_the_branch():
    layer, hw = layer_of("castling", 1, 2, threshold=0.0), (4, 6)
    x = tokens_of(hw, DIM)
    outs = []
    for scale in (1.0, 0.5, 0.0):
        layer.mask_state = replace(layer.mask_state, aux_scale=scale)
        outs.append(layer(x, hw)[0])
    assert errors(outs[0], outs[1])[0] > 1e-4 and errors(outs[1], outs[2])[0] > 1e-4
    assert torch.equal(outs[2], layer.eval()(x, hw)[0])


def test_softmax_starts_without_the_local_convolution():
    with_conv = PooledAttention(DIM, HEADS, mode="softmax", stride_kv=2)
    without = PooledAttention(DIM, HEADS, mode="softmax", stride_kv=2, local_conv=None)
    without.load_state_dict({k: v for k, v in with_conv.state_dict().items() if "dconv" not in k})
    x = tokens_of((4, 6), DIM, dtype=torch.float32)
    assert torch.equal(with_conv(x, (4, 6))[0], without(x, (4, 6))[0])


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_autocast_and_zero_tokens(mode, normalizer):
    layer = PooledAttention(32, 2, mode=mode, normalizer=normalizer, qkv_bias=False, stride_kv=4)
    x = torch.randn(1, 32 * 32, 32) + 1
    x[:, 512:] = 0
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x, (32, 32))
        out.float().square().mean().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()


@grids
@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize("mode", ATTENTION_MODES)
def test_macs_are_those_that_ran(mode, local_conv, normalizer, hw, stride_q, stride_kv):
    layer = PooledAttention(
        DIM, HEADS, dim_out=DIM_OUT, mode=mode, local_conv=local_conv, normalizer=normalizer,
        stride_q=stride_q, stride_kv=stride_kv,
    )  # fmt: skip
    x = torch.randn(2, hw[0] * hw[1], DIM)
    (record,) = count_macs(layer, x, hw)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        layer.eval()(x, hw)
    assert sum(record.macs.values()) == flops.get_total_flops() // 2
    queries, keys = (-(-hw[0] // s) * -(-hw[1] // s) for s in (stride_q, stride_kv))
    assert record.macs["projections"] == 2 * (hw[0] * hw[1] * DIM * 3 * DIM_OUT + queries * DIM_OUT * DIM_OUT)
    assert record.macs["attention_scores"] == 2 * keys * DIM_OUT * (
        queries if mode == "softmax" else 8 + (normalizer == "kernel")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=5), r"num_heads=5: expected a divisor of dim_out=12"),
        (dict(stride_q=2, stride_kv=3), r"stride_q=2, stride_kv=3: expected positive numbers"),
        (dict(stride_q=0), r"stride_q=0"),
        (dict(mode="cast"), r"mode='cast': expected one of 'softmax', 'linear', 'castling'"),
        (dict(normalizer="l1"), r"normalizer='l1'"),
        (dict(local_conv="2d"), r"local_conv='2d'"),
        (dict(threshold=-1), r"threshold=-1"),
        (dict(threshold_unit="rows"), r"threshold_unit='rows'"),
        (dict(mode="linear", eval_aux=True), r"eval_aux=True: only mode='castling'"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        PooledAttention(DIM, **{"num_heads": 3, **options})


def test_wrong_hw_is_refused():
    with pytest.raises(ValueError, match=r"x: expected \(B, 4 \* 4, 12\)"):
        PooledAttention(DIM, HEADS)(torch.zeros(1, 15, DIM), (4, 4))
