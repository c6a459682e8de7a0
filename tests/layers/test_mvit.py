"""`PooledAttention`: the linear forms against the equations for every relation of the grids; relative positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from castling_det.layers import PooledAttention
from castling_det.layers.mvit import relative_position_logits
from castling_det.ops import naive
from tests.compare import assert_parity, assert_same_gradients, errors
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
    assert_same_gradients(actual, expected, {"x": x, **parameters}, rms=1e-11, maximum=1e-10)


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
