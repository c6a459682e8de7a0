"""Linear-angular attention with `normalizer="l2"` as Triton kernels; `linear_angular.py` says what it computes.

Four passes over the tokens, each program over a chunk of one head's, and two sums of the chunks' float32 matrices:
forward sums k^ v^T and writes the outputs, backward sums q^T dL/dtotal beside the gradients of the queries, and writes
those of keys and values. What a pass needs of another is computed again rather than stored. Matrices are multiplied in
TF32, whose mantissa holds that of 16-bit inputs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, import-untyped, import-not-found"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from castling_det.ops.numerics import EPS, empty_gradients, heads_of, rows_of
from castling_det.ops.triton_masked_softmax import blocks, dot, load, store, strides

__all__ = ["LinearAngular", "fits", "precision", "tile"]

_EPS = tl.constexpr(EPS)
_PROGRAMS = 1024
"""Programs to aim at, which fill any GPU several times; fewer where that would leave a program four tiles or less."""


@triton.jit
def _chunk_of(count, chunk, heads):
    """First token of this program's chunk and the end of it; image, head and their group."""
    chunks = tl.cdiv(count, chunk)
    group = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk
    return first, tl.minimum(first + chunk, count), group // heads, group % heads, group


@triton.jit
def _length(x, eps):
    """The norm of each row, but 1 where it is not above eps."""
    norm = tl.sqrt(tl.sum(x * x, 1))
    return tl.where(norm > eps, norm, 1.0)


@triton.jit
def _total(q, kv, beside, share, PRECISION: tl.constexpr):
    """The sum before its normaliser, times |q|; |q|; one over its own length."""
    length = _length(q, _EPS)
    total = dot(q, kv, PRECISION) + beside * (length * share)[:, None]
    return total, length, 1.0 / _length(total, length * (_EPS * share))


@triton.jit
def _matrix_kernel(
    k, v, copy, partial, scale, heads, tokens, chunk, k_b, k_h, k_n, v_b, v_h, v_n, c_b, c_h, c_n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    first, last, image, head, _ = _chunk_of(tokens, chunk, heads)
    k, v, copy = k + image * k_b + head * k_h, v + image * v_b + head * v_h, copy + image * c_b + head * c_h
    total = tl.zeros((BK, BV), tl.float32)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM)
        k_tile = load(k, rows, k_n, tokens, K, BK).to(tl.float32)
        v_tile = load(v, rows, v_n, tokens, V, BV).to(tl.float32)
        total += dot(tl.trans(k_tile * (scale / _length(k_tile, _EPS))[:, None]), v_tile, PRECISION)
        if COPY:
            store(copy, rows, c_n, tokens, v_tile, V, BV)
    store(partial + tl.program_id(0).to(tl.int64) * K * V, tl.arange(0, BK), V, K, total, V, BV)


@triton.jit
def _output_kernel(
    q, own, aux, kv, out, share, heads, queries, chunk,
    q_b, q_h, q_m, w_b, w_h, w_m, a_b, a_h, a_m, o_b, o_h, o_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    AUX: tl.constexpr,
):  # fmt: skip
    first, last, image, head, group = _chunk_of(queries, chunk, heads)
    q, own, aux = q + image * q_b + head * q_h, own + image * w_b + head * w_h, aux + image * a_b + head * a_h
    kv_tile = load(kv + group * K * V, tl.arange(0, BK), V, K, V, BV)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM)
        beside = 0.5 * load(own, rows, w_m, queries, V, BV).to(tl.float32)
        if AUX:
            beside += load(aux, rows, a_m, queries, V, BV)
        q_tile = load(q, rows, q_m, queries, K, BK).to(tl.float32)
        total, _, factor = _total(q_tile, kv_tile, beside, share, PRECISION)
        store(out + image * o_b + head * o_h, rows, o_m, queries, total * factor[:, None], V, BV)


@triton.jit
def _query_kernel(
    q, own, aux, kv, grad, grad_copy, grad_q, grad_own, grad_aux, partial, share, heads, queries, chunk,
    q_b, q_h, q_m, w_b, w_h, w_m, a_b, a_h, a_m, g_b, g_h, g_m, c_b, c_h, c_m,
    dq_b, dq_h, dq_m, dw_b, dw_h, dw_m, da_b, da_h, da_m,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    AUX: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    first, last, image, head, group = _chunk_of(queries, chunk, heads)
    q, own, aux = q + image * q_b + head * q_h, own + image * w_b + head * w_h, aux + image * a_b + head * a_h
    kv_tile = load(kv + group * K * V, tl.arange(0, BK), V, K, V, BV)
    sums = tl.zeros((BK, BV), tl.float32)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM)
        beside = 0.5 * load(own, rows, w_m, queries, V, BV).to(tl.float32)
        if AUX:
            beside += load(aux, rows, a_m, queries, V, BV)
        q_tile = load(q, rows, q_m, queries, K, BK).to(tl.float32)
        total, length, factor = _total(q_tile, kv_tile, beside, share, PRECISION)
        # Derivative of t / |t|: the part of the gradient that is orthogonal to the output, divided by |t|.
        unit = total * factor[:, None]
        g = load(grad + image * g_b + head * g_h, rows, g_m, queries, V, BV).to(tl.float32)
        g = (g - unit * tl.sum(g * unit, 1)[:, None]) * factor[:, None]
        sums += dot(tl.trans(q_tile), g, PRECISION)
        of_length = tl.sum(g * beside, 1) * share / length
        of_q = dot(g, tl.trans(kv_tile), PRECISION) + q_tile * of_length[:, None]
        store(grad_q + image * dq_b + head * dq_h, rows, dq_m, queries, of_q, K, BK)
        g *= (length * share)[:, None]
        if AUX:
            store(grad_aux + image * da_b + head * da_h, rows, da_m, queries, g, V, BV)
        g *= 0.5
        if COPY:
            g += load(grad_copy + image * c_b + head * c_h, rows, c_m, queries, V, BV)
        store(grad_own + image * dw_b + head * dw_h, rows, dw_m, queries, g, V, BV)
    store(partial + tl.program_id(0).to(tl.int64) * K * V, tl.arange(0, BK), V, K, sums, V, BV)


@triton.jit
def _key_kernel(
    k, v, grad_kv, grad_k, grad_v, scale, heads, tokens, chunk,
    k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    first, last, image, head, group = _chunk_of(tokens, chunk, heads)
    k, v = k + image * k_b + head * k_h, v + image * v_b + head * v_h
    grad_k, grad_v = grad_k + image * dk_b + head * dk_h, grad_v + image * dv_b + head * dv_h
    grad_tile = load(grad_kv + group * K * V, tl.arange(0, BK), V, K, V, BV)
    for start in range(first, last, BM):
        rows = start + tl.arange(0, BM)
        k_tile = load(k, rows, k_n, tokens, K, BK).to(tl.float32)
        v_tile = load(v, rows, v_n, tokens, V, BV).to(tl.float32)
        length = _length(k_tile, _EPS)
        of_k = dot(v_tile, tl.trans(grad_tile), PRECISION)
        of_k -= k_tile * (tl.sum(of_k * k_tile, 1) / (length * length))[:, None]
        store(grad_k, rows, dk_n, tokens, of_k * (scale / length)[:, None], K, BK)
        of_v = dot(k_tile * (scale / length)[:, None], grad_tile, PRECISION)
        if ADD:
            of_v += load(grad_v, rows, dv_n, tokens, V, BV)
        store(grad_v, rows, dv_n, tokens, of_v, V, BV)


class LinearAngular(torch.autograd.Function):
    """The operator on `aux` or None, then q, k, v, or q, k, v and the values at the queries, or a packed projection.

    Returns the branch, (B, H, M, V), and of a packed projection a contiguous copy of its values, (B, N, H, V).
    """

    @staticmethod
    def forward(ctx: Any, aux: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Forward."""
        q, k, v, own = _operands(inputs)
        batch, heads, queries, _ = q.shape
        tokens, packed = k.shape[2], len(inputs) == 1
        out = v.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)
        values = v.new_empty((batch, tokens, heads, v.shape[-1])) if packed else None
        copy = v if values is None else values.transpose(1, 2)
        beside = v if aux is None else rows_of(aux)
        run, chunk = _programs(q, v, tokens)
        partial = _matrices(run, q, v)
        with torch.cuda.device_of(v):
            numbers = (1 / tokens / math.pi, heads, tokens, chunk)
            _matrix_kernel[run](k, v, copy, partial, *numbers, *strides(k, v, copy), COPY=packed, **_sizes(q, v))
            kv = partial.unflatten(0, (batch * heads, -1)).sum(1)
            run, chunk = _programs(q, v, queries)
            numbers = (1 / tokens, heads, queries, chunk)
            inside = strides(q, own, beside, out)
            _output_kernel[run](q, own, beside, kv, out, *numbers, *inside, AUX=aux is not None, **_sizes(q, v))
        ctx.save_for_backward(kv, aux, *inputs)
        return out, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of `aux` and of the inputs."""
        kv, aux, *inputs = ctx.saved_tensors
        q, k, v, own = _operands(inputs)
        heads, queries, tokens = q.shape[1], q.shape[2], k.shape[2]
        gradients = empty_gradients(inputs)
        grad_q, grad_k, grad_v, grad_own = _operands(gradients)
        beside = v if aux is None else rows_of(aux)
        grad_aux = None if aux is None else torch.empty_like(beside)
        of_aux = beside if grad_aux is None else grad_aux
        grad_out = rows_of(grad_out)
        copy = grad_out if grad_values is None else rows_of(grad_values.transpose(1, 2))
        run, chunk = _programs(q, v, queries)
        partial = _matrices(run, q, v)
        with torch.cuda.device_of(v):
            tensors = (q, own, beside, kv, grad_out, copy, grad_q, grad_own, of_aux, partial)
            inside = strides(q, own, beside, grad_out, copy, grad_q, grad_own, of_aux)
            flags = {"AUX": aux is not None, "COPY": grad_values is not None}
            _query_kernel[run](*tensors, 1 / tokens, heads, queries, chunk, *inside, **flags, **_sizes(q, v))
            grad_kv = partial.unflatten(0, (len(kv), -1)).sum(1)
            run, chunk = _programs(q, v, tokens)
            numbers = (1 / tokens / math.pi, heads, tokens, chunk)
            inside = strides(k, v, grad_k, grad_v)
            add = {"ADD": grad_own is grad_v}
            _key_kernel[run](k, v, grad_kv, grad_k, grad_v, *numbers, *inside, **add, **_sizes(q, v))
        return grad_aux, *gradients


def fits(*tensors: Tensor) -> bool:
    """Whether the tiles fit into shared memory: any up to 64 columns of 16 bits, and 160 KiB otherwise."""
    width, v = max(x.shape[-1] for x in tensors), tensors[-1]
    if not v.is_cuda or (width <= 64 and v.dtype != torch.float32):
        return True
    memory = getattr(torch.cuda.get_device_properties(v.device), "shared_memory_per_block_optin", 0)
    return memory >= 160 * 1024 and (width <= 64 or v.dtype != torch.float32)


def tile(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Rows of a tile, warps and stages of loading, for matrices of `width` columns: what fits into registers."""
    small = width > 64 or dtype == torch.float32
    return {"BM": 16 if small else 32, "num_warps": 8 if width > 64 else 4, "num_stages": 1 if small else 2}


def precision(dtype: torch.dtype) -> str:
    """How matrices are multiplied: float32 in three products of TF32, which ROCm has not, and 16 bits in one."""
    return "tf32" if dtype != torch.float32 else "ieee" if torch.version.hip else "tf32x3"


def _operands(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys, values, and values at the queries, which are the same tensor where they were not given apart."""
    heads = heads_of(inputs)
    return heads if len(heads) == 4 else [*heads, heads[2]]


def _programs(q: Tensor, v: Tensor, count: int) -> tuple[tuple[int], int]:
    """The grid over chunks of `count` tokens, and the tokens of a chunk."""
    groups, rows = q.shape[0] * q.shape[1], tile(v.dtype, max(q.shape[-1], v.shape[-1]))["BM"]
    chunks = min(triton.cdiv(_PROGRAMS, groups), triton.cdiv(count, 4 * rows))
    chunk = triton.cdiv(triton.cdiv(count, chunks), rows) * rows
    return (groups * triton.cdiv(count, chunk),), chunk


def _matrices(run: tuple[int], q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty((*run, q.shape[-1], v.shape[-1]), dtype=torch.float32)


def _sizes(q: Tensor, v: Tensor) -> dict[str, Any]:
    widths = blocks(q, v)
    return {**widths, **tile(v.dtype, max(widths["BK"], widths["BV"])), "PRECISION": precision(v.dtype)}
