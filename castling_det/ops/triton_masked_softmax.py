"""The masked softmax branch as Triton kernels; `masked_softmax.py` says what it computes.

Tensors are (B, H, M or N, K or V) with any strides but that of the last axis, which is 1. Sums are float32. Forward: a
pass over the keys for the maximum and the sum of each row, and one that keeps what is above the threshold. Backward
computes the same tiles again, so that an entry falls on the same side of the threshold. Nothing waits for the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, import-untyped, import-not-found"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from castling_det.ops.numerics import rows_of

__all__ = ["backward", "blocks", "dot", "forward", "load", "store", "strides", "tile"]

_LOG2_E = 1.4426950408889634
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """The product in float32; the interpreter has none of bfloat16 matrices."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load(base, rows, row_stride, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix, (rows, BLOCK), zero outside."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, rows, row_stride, count, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes rows of a matrix, in its dtype."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    place = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _tile_of(count, heads, BLOCK: tl.constexpr):
    """Rows of this program's tile, and the group that they belong to, with its image and head."""
    tiles = tl.cdiv(count, BLOCK)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    return tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK), group, group // heads, group % heads


@triton.jit
def _logits(q, k, columns, tokens, scale):
    """Logits of a tile in powers of two, (BM, BN); minus infinity beyond the last key."""
    return tl.where(columns[None, :] < tokens, dot(q, tl.trans(k), "ieee") * scale, float("-inf"))


@triton.jit
def _probabilities(q, k, columns, tokens, scale, threshold, top, inverse):
    """All probabilities of a tile, and which of them are kept; a NaN is, so that it is seen."""
    # Equal logits give exactly 1 / N, which is not above a threshold of 1 / N; exp2(s - log2(total)) would round.
    p = tl.exp2(_logits(q, k, columns, tokens, scale) - top[:, None]) * inverse[:, None]
    return p, (p <= threshold) == 0


@triton.jit
def _forward_kernel(
    q, k, v, out, mass, kept, tops, inverses, scale, threshold, heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, group, image, head = _tile_of(queries, heads, BM)
    q_tile = load(q + image * q_b + head * q_h, rows, q_m, queries, K, BK)
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, tokens, BN):
        columns = start + tl.arange(0, BN)
        s = _logits(q_tile, load(k, columns, k_n, tokens, K, BK), columns, tokens, scale)
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    inverse = tl.div_rn(1.0, total)
    result = tl.zeros((BM, BV), tl.float32)
    row_mass = tl.zeros((BM,), tl.float32)
    row_kept = tl.zeros((BM,), tl.int32)
    for start in range(0, tokens, BN):
        columns = start + tl.arange(0, BN)
        k_tile = load(k, columns, k_n, tokens, K, BK)
        p, above = _probabilities(q_tile, k_tile, columns, tokens, scale, threshold, top, inverse)
        count = tl.sum(above.to(tl.int32), 1)
        if tl.max(count, 0) > 0:
            p = tl.where(above, p, 0.0)
            row_mass += tl.sum(p, 1)
            row_kept += count
            v_tile = load(v, columns, v_n, tokens, V, BV)
            result += dot(p.to(v_tile.dtype), v_tile, "ieee")
    store(out + image * o_b + head * o_h, rows, o_m, queries, result, V, BV)
    place, inside = group * queries + rows, rows < queries
    tl.store(mass + place, row_mass, mask=inside)
    tl.store(kept + place, row_kept, mask=inside)
    tl.store(tops + place, top, mask=inside)
    tl.store(inverses + place, inverse, mask=inside)


@triton.jit
def _row_gradients(place, inside, sums, grad_mass, tops, inverses):
    """The numbers of each row that its gradients need; outside they give a probability of zero."""
    row_sum = tl.load(sums + place, mask=inside, other=0.0)
    row_grad = tl.load(grad_mass + place, mask=inside, other=0.0)
    top = tl.load(tops + place, mask=inside, other=0.0)
    return row_sum, row_grad, top, tl.load(inverses + place, mask=inside, other=0.0)


@triton.jit
def _logit_gradients(p, above, grad_tile, v_tile, row_sum, row_grad):
    # Through the denominator every logit of a row, kept or not, receives a gradient.
    grad_p = dot(grad_tile, tl.trans(v_tile), "ieee") + row_grad[:, None]
    return p * (tl.where(above, grad_p, 0.0) - row_sum[:, None])


@triton.jit
def _query_kernel(
    q, k, v, grad, grad_q, mass, sums, grad_mass, tops, inverses, factor, scale, threshold, heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dq_b, dq_h, dq_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, group, image, head = _tile_of(queries, heads, BM)
    place, inside = group * queries + rows, rows < queries
    result = tl.zeros((BM, BK), tl.float32)
    # Rows that kept nothing have no gradient.
    if tl.max((tl.load(mass + place, mask=inside, other=0.0) != 0).to(tl.int32), 0) > 0:
        q_tile = load(q + image * q_b + head * q_h, rows, q_m, queries, K, BK)
        grad_tile = load(grad + image * g_b + head * g_h, rows, g_m, queries, V, BV)
        k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
        row_sum, row_grad, top, inverse = _row_gradients(place, inside, sums, grad_mass, tops, inverses)
        for start in range(0, tokens, BN):
            columns = start + tl.arange(0, BN)
            k_tile, v_tile = load(k, columns, k_n, tokens, K, BK), load(v, columns, v_n, tokens, V, BV)
            p, above = _probabilities(q_tile, k_tile, columns, tokens, scale, threshold, top, inverse)
            grad_s = _logit_gradients(p, above, grad_tile, v_tile, row_sum, row_grad)
            result += dot(grad_s.to(k_tile.dtype), k_tile, "ieee")
    store(grad_q + image * dq_b + head * dq_h, rows, dq_m, queries, result * factor, K, BK)


@triton.jit
def _key_kernel(
    q, k, v, grad, grad_k, grad_v, mass, sums, grad_mass, tops, inverses, factor, scale, threshold,
    heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    columns, group, image, head = _tile_of(tokens, heads, BN)
    k_tile = load(k + image * k_b + head * k_h, columns, k_n, tokens, K, BK)
    v_tile = load(v + image * v_b + head * v_h, columns, v_n, tokens, V, BV)
    q, grad = q + image * q_b + head * q_h, grad + image * g_b + head * g_h
    of_k, of_v = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    for start in range(0, queries, BM):
        rows = start + tl.arange(0, BM)
        place, inside = group * queries + rows, rows < queries
        if tl.max((tl.load(mass + place, mask=inside, other=0.0) != 0).to(tl.int32), 0) > 0:
            q_tile, grad_tile = load(q, rows, q_m, queries, K, BK), load(grad, rows, g_m, queries, V, BV)
            row_sum, row_grad, top, inverse = _row_gradients(place, inside, sums, grad_mass, tops, inverses)
            p, above = _probabilities(q_tile, k_tile, columns, tokens, scale, threshold, top, inverse)
            of_v += dot(tl.trans(tl.where(above, p, 0.0).to(grad_tile.dtype)), grad_tile, "ieee")
            grad_s = _logit_gradients(p, above, grad_tile, v_tile, row_sum, row_grad)
            of_k += dot(tl.trans(grad_s.to(q_tile.dtype)), q_tile, "ieee")
    store(grad_k + image * dk_b + head * dk_h, columns, dk_n, tokens, of_k * factor, K, BK)
    store(grad_v + image * dv_b + head * dv_h, columns, dv_n, tokens, of_v, V, BV)


def tile(dtype: torch.dtype, width: int, *, gradient: bool) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps, for tensors of `width` columns: what fits into registers."""
    if width > 64:
        if dtype == torch.float32:
            return (16, 16, 4) if gradient else (32, 16, 4)
        return (32, 32, 8) if gradient else (64, 32, 4)
    if dtype == torch.float32:
        return 32, 32, 4
    return (64, 32, 4) if gradient else (64, 64, 4)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mass: Tensor, statistics: Tensor, threshold: float, scale: float
) -> Tensor:
    """Writes output, kept mass, and largest logit and inverse sum of each row; returns its kept entries, (B, H, M)."""
    batch, heads, queries, _ = q.shape
    kept = torch.empty_like(mass, dtype=torch.int32)
    widths, rows, _ = _sizes(q, v, gradient=False)
    numbers = (scale * _LOG2_E, threshold, heads, queries, k.shape[2])
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(queries, rows) * batch * heads,)](
            q, k, v, out, mass, kept, *statistics.unbind(), *numbers, *strides(q, k, v, out), **widths
        )
    return kept


def backward(
    gradients: list[Tensor],
    grad_out: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_rows: tuple[Tensor, Tensor, Tensor],
    threshold: float,
    scale: float,
) -> None:
    """Writes the gradients of q, k and v; `of_rows` is what forward wrote."""
    out, mass, statistics = of_rows
    grad_out = rows_of(grad_out)
    grad_q, grad_k, grad_v = gradients
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    # The row sums sum_j p_ij dL/dp_ij of softmax's backward follow from the outputs, without N products a row.
    sums = (grad_out.float() * out.float()).sum(dim=-1) + grad_mass * mass
    widths, rows, columns = _sizes(q, v, gradient=True)
    numbers = (mass, sums, grad_mass.contiguous(), *statistics.unbind(), scale, scale * _LOG2_E, threshold)
    numbers = (*numbers, heads, queries, tokens, *strides(q, k, v, grad_out))
    with torch.cuda.device_of(q):
        _query_kernel[(triton.cdiv(queries, rows) * batch * heads,)](
            q, k, v, grad_out, grad_q, *numbers, *strides(grad_q), **widths
        )
        _key_kernel[(triton.cdiv(tokens, columns) * batch * heads,)](
            q, k, v, grad_out, grad_k, grad_v, *numbers, *strides(grad_k, grad_v), **widths
        )


def strides(*tensors: Tensor) -> list[int]:
    """Strides of image, head and row of each tensor."""
    assert all(x.stride(-1) == 1 for x in tensors)
    return [stride for x in tensors for stride in x.stride()[:3]]


def blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Columns of keys and values, and of the tiles that hold them: a power of two, for products at least 16."""
    sizes = {"K": q.shape[-1], "V": v.shape[-1]}
    return sizes | {f"B{name}": max(16, triton.next_power_of_2(size)) for name, size in sizes.items()}


def _sizes(q: Tensor, v: Tensor, *, gradient: bool) -> tuple[dict[str, Any], int, int]:
    widths = blocks(q, v)
    rows, columns, warps = tile(q.dtype, max(widths["BK"], widths["BV"]), gradient=gradient)
    return {**widths, "BM": rows, "BN": columns, "num_warps": warps}, rows, columns
