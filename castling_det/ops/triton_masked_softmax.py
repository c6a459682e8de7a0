"""The masked softmax branch as Triton kernels, for CUDA and ROCm; the meaning is that of `masked_softmax.py`.

Tensors are (B, H, M or N, K or V) with any strides but that of the last axis, which is 1. Sums are float32. Forward: a
pass over the keys for the log-sum-exp of each row, and one that keeps what is above the threshold. Backward computes
the same tiles again, so that an entry falls on the same side of the threshold. Nothing waits for the device.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, import-untyped, import-not-found"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward", "tile"]

LOG2_E = 1.4426950408889634


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b):
    """The product in float32; the interpreter has none of bfloat16 matrices."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(base, rows, row_stride, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix, (rows, BLOCK), zero outside."""
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(base + rows[:, None].to(tl.int64) * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, row_stride, count, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < count) & (columns[None, :] < WIDTH)
    place = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(place, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _logits(q, k, columns, tokens, scale_log2):
    """Logits of a tile in powers of two, (BM, BN); minus infinity beyond the last key."""
    s = _dot(q, tl.trans(k)) * scale_log2
    return tl.where(columns[None, :] < tokens, s, float("-inf"))


@triton.jit
def _forward_kernel(
    q, k, v, out, mass, kept, lse, scale_log2, threshold, heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    image, head = group // heads, group % heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    q_tile = _load(q + image * q_b + head * q_h, rows, q_m, queries, K, BK)
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, tokens, BN):
        columns = start + tl.arange(0, BN)
        s = _logits(q_tile, _load(k, columns, k_n, tokens, K, BK), columns, tokens, scale_log2)
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
        top = higher
    log_sum = top + tl.log2(total)
    result = tl.zeros((BM, BV), tl.float32)
    row_mass = tl.zeros((BM,), tl.float32)
    row_kept = tl.zeros((BM,), tl.int32)
    for start in range(0, tokens, BN):
        columns = start + tl.arange(0, BN)
        s = _logits(q_tile, _load(k, columns, k_n, tokens, K, BK), columns, tokens, scale_log2)
        p = tl.exp2(s - log_sum[:, None])
        above = p > threshold
        count = tl.sum(above.to(tl.int32), 1)
        if tl.max(count, 0) > 0:
            p = tl.where(above, p, 0.0)
            row_mass += tl.sum(p, 1)
            row_kept += count
            v_tile = _load(v, columns, v_n, tokens, V, BV)
            result += _dot(p.to(v_tile.dtype), v_tile)
    _store(out + image * o_b + head * o_h, rows, o_m, queries, result, V, BV)
    place, inside = group * queries + rows, rows < queries
    tl.store(mass + place, row_mass, mask=inside)
    tl.store(kept + place, row_kept, mask=inside)
    tl.store(lse + place, log_sum, mask=inside)


@triton.jit
def _gradient_tile(
    q_tile, k_tile, v_tile, grad_tile, columns, tokens, scale_log2, threshold, row_lse, row_sum, row_grad
):
    """The kept probabilities of a tile, and the gradient of its logits, both (BM, BN)."""
    p = tl.exp2(_logits(q_tile, k_tile, columns, tokens, scale_log2) - row_lse[:, None])
    above = p > threshold
    grad_p = _dot(grad_tile, tl.trans(v_tile)) + row_grad[:, None]
    # Through the denominator every logit of a row, kept or not, receives a gradient.
    return tl.where(above, p, 0.0), p * (tl.where(above, grad_p, 0.0) - row_sum[:, None])


@triton.jit
def _query_kernel(
    q, k, v, grad, grad_q, mass, lse, sums, grad_mass, scale, scale_log2, threshold, heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dq_b, dq_h, dq_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    image, head = group // heads, group % heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    place, inside = group * queries + rows, rows < queries
    result = tl.zeros((BM, BK), tl.float32)
    # Rows that kept nothing have no gradient.
    if tl.max(tl.load(mass + place, mask=inside, other=0.0), 0) > 0:
        q_tile = _load(q + image * q_b + head * q_h, rows, q_m, queries, K, BK)
        grad_tile = _load(grad + image * g_b + head * g_h, rows, g_m, queries, V, BV)
        k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
        row_lse = tl.load(lse + place, mask=inside, other=0.0)
        row_sum = tl.load(sums + place, mask=inside, other=0.0)
        row_grad = tl.load(grad_mass + place, mask=inside, other=0.0)
        for start in range(0, tokens, BN):
            columns = start + tl.arange(0, BN)
            k_tile = _load(k, columns, k_n, tokens, K, BK)
            v_tile = _load(v, columns, v_n, tokens, V, BV)
            _, grad_s = _gradient_tile(
                q_tile, k_tile, v_tile, grad_tile, columns, tokens, scale_log2, threshold, row_lse, row_sum, row_grad
            )
            result += _dot(grad_s.to(k_tile.dtype), k_tile)
    _store(grad_q + image * dq_b + head * dq_h, rows, dq_m, queries, result * scale, K, BK)


@triton.jit
def _key_kernel(
    q, k, v, grad, grad_k, grad_v, mass, lse, sums, grad_mass, scale, scale_log2, threshold, heads, queries, tokens,
    q_b, q_h, q_m, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_m, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    image, head = group // heads, group % heads
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    k_tile = _load(k + image * k_b + head * k_h, columns, k_n, tokens, K, BK)
    v_tile = _load(v + image * v_b + head * v_h, columns, v_n, tokens, V, BV)
    q, grad = q + image * q_b + head * q_h, grad + image * g_b + head * g_h
    of_k, of_v = tl.zeros((BN, BK), tl.float32), tl.zeros((BN, BV), tl.float32)
    for start in range(0, queries, BM):
        rows = start + tl.arange(0, BM)
        place, inside = group * queries + rows, rows < queries
        if tl.max(tl.load(mass + place, mask=inside, other=0.0), 0) > 0:
            q_tile, grad_tile = _load(q, rows, q_m, queries, K, BK), _load(grad, rows, g_m, queries, V, BV)
            row_lse = tl.load(lse + place, mask=inside, other=float("inf"))
            row_sum = tl.load(sums + place, mask=inside, other=0.0)
            row_grad = tl.load(grad_mass + place, mask=inside, other=0.0)
            p, grad_s = _gradient_tile(
                q_tile, k_tile, v_tile, grad_tile, columns, tokens, scale_log2, threshold, row_lse, row_sum, row_grad
            )
            of_v += _dot(tl.trans(p).to(grad_tile.dtype), grad_tile)
            of_k += _dot(tl.trans(grad_s).to(q_tile.dtype), q_tile)
    _store(grad_k + image * dk_b + head * dk_h, columns, dk_n, tokens, of_k * scale, K, BK)
    _store(grad_v + image * dv_b + head * dv_h, columns, dv_n, tokens, of_v, V, BV)


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
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, threshold: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes `out`, (B, H, M, V); gives kept mass, kept entries of each row, and log2-sum-exp2, (B, H, M)."""
    batch, heads, queries, _ = q.shape
    q, k, v = map(_rows, (q, k, v))
    mass, lse = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    kept = torch.empty(q.shape[:3], dtype=torch.int32, device=q.device)
    sizes, (rows, _, _) = _sizes(q, k, v, gradient=False)
    numbers = (scale * LOG2_E, threshold, heads, queries, k.shape[2])
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(out))
    _forward_kernel[triton.cdiv(queries, rows), batch * heads](
        q, k, v, out, mass, kept, lse, *numbers, *strides, **sizes
    )
    return mass, kept, lse


def backward(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_mass: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    mass: Tensor,
    lse: Tensor,
    threshold: float,
    scale: float,
) -> None:
    """Writes the gradients of q, k and v."""
    q, k, v = map(_rows, inputs)
    grad_q, grad_k, grad_v = gradients
    grad_out, grad_mass = _rows(grad_out), grad_mass.float().contiguous()
    batch, heads, queries, _ = q.shape
    tokens = k.shape[2]
    # The row sums sum_j p_ij dL/dp_ij of softmax's backward follow from the outputs, without N products a row.
    sums = (grad_out.float() * out.float()).sum(dim=-1) + grad_mass * mass
    sizes, (rows, columns, _) = _sizes(q, k, v, gradient=True)
    numbers = (scale, scale * LOG2_E, threshold, heads, queries, tokens)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(grad_out))
    of_rows = (mass, lse, sums, grad_mass)
    _query_kernel[triton.cdiv(queries, rows), batch * heads](
        q, k, v, grad_out, grad_q, *of_rows, *numbers, *strides, *_strides(grad_q), **sizes
    )
    _key_kernel[triton.cdiv(tokens, columns), batch * heads](
        q, k, v, grad_out, grad_k, grad_v, *of_rows, *numbers, *strides, *_strides(grad_k), *_strides(grad_v), **sizes
    )


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where its last axis is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, ...]:
    assert x.stride(-1) == 1
    return x.stride()[:3]


def _sizes(q: Tensor, k: Tensor, v: Tensor, *, gradient: bool) -> tuple[dict[str, Any], tuple[int, int, int]]:
    widths = q.shape[-1], v.shape[-1]
    blocks = [max(16, triton.next_power_of_2(width)) for width in widths]
    rows, columns, warps = tile(q.dtype, max(blocks), gradient=gradient)
    names = {"K": widths[0], "V": widths[1], "BK": blocks[0], "BV": blocks[1], "BM": rows, "BN": columns}
    return {**names, "num_warps": warps}, (rows, columns, warps)
