"""The auxiliary branch of training: softmax attention that keeps only the probabilities above a threshold.

Exact, computed in blocks of queries and again in backward: no N x N tensor is alive across the call or inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castling_det.ops.numerics import accumulation_dtype, uses_kernels, without_autocast

__all__ = ["MaskedSoftmax", "masked_softmax", "masked_softmax_attention", "masked_softmax_packed"]

_BLOCK_ELEMENTS = 1 << 19
"""Probabilities that are alive at once: 2 MiB in float32, which fit in the caches."""


class MaskedSoftmax(NamedTuple):
    """The output of the branch and how much its mask kept."""

    out: Tensor
    """(B, H, M, V), `(p * [p > threshold]) @ v`."""
    kept_mass: Tensor
    """(B, H, M), the kept probability of each row, in [0, 1]; differentiable."""
    kept_fraction: Tensor
    """0-d float32, the kept share of all M x N entries, in [0, 1]; no gradient."""


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """Computes `p = softmax(scale * q k^T)`, keeps `p > threshold` (rows are not renormalised) and multiplies by v.

    Args:
        q: queries, (B, H, M, K), any float dtype.
        k: keys, (B, H, N, K).
        v: values, (B, H, N, V).
        threshold: probability in [0, inf]. From 1 on nothing is kept, and nothing is computed.
        scale: factor on the logits; None is K ** -0.5.

    Returns:
        Output in the dtype of `v`, kept mass in the accumulation dtype (float32 for half precisions).

    Raises:
        ValueError: negative or NaN threshold.
    """
    _check_threshold(threshold)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = v.dtype if uses_kernels(v) else accumulation_dtype(v.dtype)
    with without_autocast(v):
        # A tensor, because the threshold changes every iteration and torch.compile makes a graph for every number.
        limit = torch.full((), threshold, dtype=torch.float64)
        out, kept_mass, count, _ = _forward(q.to(dtype), k.to(dtype), v.to(dtype), limit, scale)
    return _result(out.to(v.dtype), kept_mass, count, k.shape[-2])


def masked_softmax_packed(qkv: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """`masked_softmax` of a packed projection, (B, N, 3, H, K), whose gradient is written into one packed tensor."""
    if torch.compiler.is_compiling():
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return masked_softmax(q, k, v, threshold, scale=scale)
    _check_threshold(threshold)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, kept_mass, count = _Packed.apply(qkv, threshold, scale)  # type: ignore[no-untyped-call]
    return _result(out, kept_mass, count, qkv.shape[1])


def _check_threshold(threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: expected a probability in [0, inf]; from 1 on the mask is empty")


def _result(out: Tensor, kept_mass: Tensor, count: Tensor, num_keys: int) -> MaskedSoftmax:
    return MaskedSoftmax(out, kept_mass, (count.double() / max(kept_mass.numel() * num_keys, 1)).float())


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`masked_softmax` without the kept mass: `(out, kept_fraction)`."""
    result = masked_softmax(q, k, v, threshold, scale=scale)
    return result.out, result.kept_fraction


# Registered operators, so that torch.compile and torch.export see each of them as one node.
@torch.library.custom_op("castling_det::masked_softmax", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, H, M, V), with heads side by side in memory; kept mass (B, H, M); kept entries, 0-d int64.

    Then what Triton's backward needs of each row, (B, H, M); without kernels it is empty.
    """
    out = _empty_output(q, v).zero_()
    kept_mass = v.new_zeros(q.shape[:-1], dtype=accumulation_dtype(v.dtype))
    count = torch.zeros((), dtype=torch.long, device=v.device)
    # No probability exceeds 1, though a computed one may by rounding: from a threshold of 1 on nothing is kept.
    limit = float(threshold)
    if uses_kernels(v):
        if limit >= 1 or not q.numel() * k.shape[2]:
            return out, kept_mass, count, torch.zeros_like(kept_mass)
        kept_mass, kept, lse = _kernels().forward(q, k, v, out, limit, scale)
        return out, kept_mass, kept.sum(dtype=torch.long), lse
    for heads, rows in _blocks(q, k) if limit < 1 else ():
        sparse_GMN = F.threshold(_probabilities(q[rows] * scale, k[heads]), limit, 0.0, inplace=True)
        mass_GM = sparse_GMN.sum(dim=-1)
        # On an accelerator this test would make the host wait.
        if mass_GM.device.type == "cpu" and not mass_GM.any():
            continue
        kept_mass[rows] = mass_GM
        out[rows] = sparse_GMN @ v[heads]
        # Thirty times as fast as count_nonzero on a CPU. Float sums of ones are exact for any row that fits in memory.
        count += sparse_GMN.sign_().sum(dim=-1).sum(dtype=torch.long)
    return out, kept_mass, count, v.new_empty(0)


@torch.library.custom_op("castling_det::masked_softmax_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept_mass: Tensor,
    lse: Tensor,
    threshold: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    _add_gradients(gradients, grad_out, grad_mass, q, k, v, out, kept_mass, lse, threshold, scale)
    return gradients


def _add_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_mass: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept_mass: Tensor,
    lse: Tensor,
    threshold: Tensor,
    scale: float,
) -> None:
    """Adds to the gradients of q, k and v, which start at zero; computes the probabilities again."""
    if uses_kernels(v):
        if float(threshold) < 1 and q.numel() * k.shape[2]:
            _kernels().backward(gradients, grad_out, grad_mass, (q, k, v), out, kept_mass, lse, float(threshold), scale)
        return
    grad_q, grad_k, grad_v = gradients
    # The row sums sum_j p_ij dL/dp_ij of softmax's backward follow from the outputs, without N products a row.
    row_sums = (grad_out * out).sum(dim=-1) + grad_mass * kept_mass
    limit = float(threshold)
    for heads, rows in _blocks(q, k) if limit < 1 else ():
        if not kept_mass[rows].any():
            continue
        scaled_q_GMK, grad_GMK = q[rows] * scale, grad_out[rows]
        p_GMN = _probabilities(scaled_q_GMK, k[heads])
        sparse_GMN = F.threshold(p_GMN, limit, 0.0)
        grad_v[heads] += sparse_GMN.transpose(-2, -1) @ grad_GMK
        grad_s_GMN = torch.baddbmm(grad_mass[rows].unsqueeze(-1), grad_GMK, v[heads].transpose(-2, -1))
        # Through the denominator every logit of a row, kept or not, receives a gradient.
        grad_s_GMN.mul_(sparse_GMN).addcmul_(p_GMN, row_sums[rows].unsqueeze(-1), value=-1)
        grad_q[rows] = grad_s_GMN @ k[heads] * scale
        grad_k[heads] += grad_s_GMN.transpose(-2, -1) @ scaled_q_GMK


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, threshold: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mass = v.new_empty(q.shape[:-1], dtype=accumulation_dtype(v.dtype))
    lse = torch.empty_like(mass) if uses_kernels(v) else v.new_empty(0)
    return _empty_output(q, v), mass, v.new_empty((), dtype=torch.long), lse


@_backward.register_fake
def _(grad_out: Tensor, grad_mass: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    q, k, v, threshold, ctx.scale = inputs
    out, kept_mass, count, lse = output
    ctx.save_for_backward(q, k, v, out, kept_mass, lse, threshold)
    ctx.mark_non_differentiable(count, lse)


def _gradients(ctx: Any, grad_out: Tensor, grad_mass: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(grad_out, grad_mass, *ctx.saved_tensors, ctx.scale)
    return *gradients, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


class _Packed(torch.autograd.Function):
    """The operators above on packed tensors. Autograd would stack three gradients and hold them twice."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, threshold: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        limit = torch.full((), threshold, dtype=torch.float64)
        with without_autocast(qkv):
            dtype = qkv.dtype if uses_kernels(qkv) else accumulation_dtype(qkv.dtype)
            q, k, v = (x.transpose(1, 2) for x in qkv.to(dtype).unbind(2))
            out, kept_mass, count, lse = _forward(q, k, v, limit, scale)
        ctx.save_for_backward(qkv, out, kept_mass, lse, limit)
        ctx.scale = scale
        ctx.mark_non_differentiable(count)
        return out.to(qkv.dtype), kept_mass, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_mass: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, kept_mass, lse, limit = ctx.saved_tensors
        dtype = qkv.dtype if uses_kernels(qkv) else kept_mass.dtype
        with without_autocast(qkv):
            q, k, v = (x.transpose(1, 2) for x in qkv.to(dtype).unbind(2))
            grad_qkv = torch.zeros_like(qkv, dtype=dtype)
            grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grad_qkv.unbind(2))
            gradients = grad_q, grad_k, grad_v
            _add_gradients(gradients, grad_out.to(dtype), grad_mass, q, k, v, out, kept_mass, lse, limit, ctx.scale)
        return grad_qkv.to(qkv.dtype), None, None


def _kernels() -> Any:
    # Imported where they run: Triton is not installed everywhere.
    from castling_det.ops import triton_masked_softmax

    return triton_masked_softmax


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    batch, num_heads, queries, _ = q.shape
    # Heads side by side in memory, as in a packed projection: merging them is a view, not a copy.
    return v.new_empty((batch, queries, num_heads, v.shape[-1])).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, slice], tuple[int, slice, slice]]]:
    """Indices of heads, and of their queries, in blocks of at most `_BLOCK_ELEMENTS` probabilities (or one row)."""
    batch, num_heads, queries, _ = q.shape
    tokens = k.shape[2]
    rows = min(queries, max(1, _BLOCK_ELEMENTS // max(1, tokens)))
    heads = max(1, _BLOCK_ELEMENTS // max(1, rows * tokens))
    for image in range(batch):
        for head in range(0, num_heads, heads):
            for row in range(0, queries, rows):
                group = slice(head, min(head + heads, num_heads))
                yield (image, group), (image, group, slice(row, min(row + rows, queries)))


def _probabilities(scaled_q_GMK: Tensor, k_GNK: Tensor) -> Tensor:
    # Forward and backward make the same calls, so that an entry at the threshold falls on the same side in both.
    return torch.softmax(scaled_q_GMK @ k_GNK.transpose(-2, -1), dim=-1)
