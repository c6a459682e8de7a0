"""The auxiliary branch of training: softmax attention of which only the probabilities above a threshold are kept.

Exact, by blocks of queries, recomputed in backward: no N x N tensor is alive across the call or inside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from castling_det.ops.numerics import accumulation_dtype, without_autocast

__all__ = ["MaskedSoftmax", "masked_softmax", "masked_softmax_attention"]

_BLOCK_ELEMENTS = 1 << 20
"""Probabilities alive at once: 4 MiB in float32, about what the caches hold."""


class MaskedSoftmax(NamedTuple):
    """The branch's output and what its mask kept."""

    out: Tensor
    """(B, H, N, K), `(p * [p > threshold]) @ v`."""
    kept_mass: Tensor
    """(B, H, N), the kept probability of each row, in [0, 1]; differentiable."""
    kept_fraction: Tensor
    """0-d float32, the kept share of all N x N entries, in [0, 1]; no gradient."""


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """Computes `p = softmax(scale * q k^T)`, keeps `p > threshold` (rows are not renormalised) and multiplies by v.

    Args:
        q: queries, (B, H, N, K), any float dtype.
        k: keys, (B, H, N, K).
        v: values, (B, H, N, K).
        threshold: probability in [0, inf]. From 1 on nothing is kept for certain, and nothing is computed.
        scale: factor on the logits; None is K ** -0.5.

    Returns:
        Output in the dtype of `v`, kept mass in the accumulation dtype (float32 for half precisions).

    Raises:
        ValueError: negative or NaN threshold.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}: expected a probability in [0, inf]; from 1 on the mask is empty")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    accumulation = accumulation_dtype(v.dtype)
    with without_autocast(v):
        # Batch and heads are one axis of independent problems.
        q_GNK, k_GNK, v_GNK = (x.to(accumulation).flatten(0, -3) for x in (q, k, v))
        out, kept_mass, kept_fraction = _MaskedSoftmaxFunction.apply(  # type: ignore[no-untyped-call]
            q_GNK, k_GNK, v_GNK, threshold, scale
        )
    return MaskedSoftmax(out.reshape(v.shape).to(v.dtype), kept_mass.reshape(v.shape[:-1]), kept_fraction)


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`masked_softmax` without the mass: `(out, kept_fraction)`, shapes and errors as there."""
    result = masked_softmax(q, k, v, threshold, scale=scale)
    return result.out, result.kept_fraction


class _MaskedSoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, threshold: float, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros_like(v)
        kept_mass = v.new_zeros(v.shape[:-1])
        kept_counts = [torch.zeros((), dtype=torch.long, device=v.device)]
        # No probability is above 1, though a computed one may round to a little more: 1 keeps nothing.
        blocks = _blocks(q) if threshold < 1 else []
        for head, rows in blocks:
            sparse_GMN = F.threshold(_probabilities(q[head, rows] * scale, k[head]), threshold, 0.0, inplace=True)
            kept_counts.append(sparse_GMN.count_nonzero())
            kept_mass[head, rows] = sparse_GMN.sum(dim=-1)
            out[head, rows] = sparse_GMN @ v[head]
        counts = torch.stack(kept_counts)
        entries = q[..., 0].numel() * k.shape[-2]
        kept_fraction = (counts.sum().double() / max(entries, 1)).float()
        ctx.save_for_backward(q, k, v, out, kept_mass, counts)
        ctx.blocks, ctx.threshold, ctx.scale = blocks, threshold, scale
        ctx.mark_non_differentiable(kept_fraction)
        return out, kept_mass, kept_fraction

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor, grad_mass: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, kept_mass, counts = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # sum_j p_ij dL/dp_ij of softmax's backward without the N products: the kept p_ij sum up to the outputs.
        row_sums = (grad_out * out).sum(dim=-1) + grad_mass * kept_mass
        for (head, rows), count in zip(ctx.blocks, counts[1:].tolist(), strict=True):
            if count == 0:
                continue
            scaled_q_GMK, grad_GMK = q[head, rows] * ctx.scale, grad_out[head, rows]
            p_GMN = _probabilities(scaled_q_GMK, k[head])
            sparse_GMN = F.threshold(p_GMN, ctx.threshold, 0.0)
            grad_v[head] += sparse_GMN.transpose(-2, -1) @ grad_GMK
            grad_s_GMN = torch.baddbmm(grad_mass[head, rows].unsqueeze(-1), grad_GMK, v[head].transpose(-2, -1))
            # A row's p reaches every logit of the row, kept or not, through the denominator.
            grad_s_GMN.mul_(sparse_GMN).addcmul_(p_GMN, row_sums[head, rows].unsqueeze(-1), value=-1)
            grad_q[head, rows] = grad_s_GMN @ k[head] * ctx.scale
            grad_k[head] += grad_s_GMN.transpose(-2, -1) @ scaled_q_GMK
        return grad_q, grad_k, grad_v, None, None


def _blocks(q_GNK: Tensor) -> list[tuple[slice, slice]]:
    """Slices of heads and of queries that hold at most `_BLOCK_ELEMENTS` probabilities, or one row."""
    groups, tokens, _ = q_GNK.shape
    rows = min(tokens, max(1, _BLOCK_ELEMENTS // max(1, tokens)))
    heads = max(1, _BLOCK_ELEMENTS // max(1, rows * tokens))
    return [
        (slice(head, min(head + heads, groups)), slice(row, min(row + rows, tokens)))
        for head in range(0, groups, heads)
        for row in range(0, tokens, rows)
    ]


def _probabilities(scaled_q_GMK: Tensor, k_GNK: Tensor) -> Tensor:
    # The same calls forward and backward, so that an entry at the threshold falls on the same side in both.
    return torch.softmax(scaled_q_GMK @ k_GNK.transpose(-2, -1), dim=-1)
