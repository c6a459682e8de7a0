"""Linear-angular attention (Castling-ViT, arXiv 2211.10526): the angular kernel without its residual, O(N K^2)."""

from __future__ import annotations

import math

from torch import Tensor

from castling_det.ops.masked_softmax import MaskedSoftmax
from castling_det.ops.numerics import accumulation_dtype, inverse_norm, without_autocast

__all__ = ["NORMALIZERS", "linear_angular_attention"]

NORMALIZERS = ("l2", "kernel")


def linear_angular_attention(
    q: Tensor, k: Tensor, v: Tensor, *, normalizer: str = "l2", aux: MaskedSoftmax | None = None
) -> Tensor:
    """Attends with sim(q, k) = 1/2 + cos(q, k)/pi, evaluated as q^ (k^T v), hats L2-normalised over the last axis.

    `normalizer="l2"` is the published block: `l2(aux + v/2 + (1/pi) q^ (k^T v))`, v/2 taken per token.
    `normalizer="kernel"` is the row-stochastic form: `sum_j w_ij v_j` with `w_ij = sim_ij / sum_j sim_ij`, in
    which sim >= 1/2 - 1/pi > 0, so that each output is a convex average of the values.

    Args:
        q: queries, (B, H, N, K), any float dtype. Not normalised by the caller.
        k: keys, (B, H, N, K).
        v: values, (B, H, N, K).
        normalizer: `"l2"` or `"kernel"`.
        aux: the masked softmax branch of the same q, k, v while training, or None. Under `"l2"` its output joins the
            sum (published). Under `"kernel"` both branches are averages, so the result is the average of all their
            weights, `(linear + aux.out) / (1 + aux.kept_mass)`: convex at every threshold, `linear` once the mask is
            empty.

    Returns:
        (B, H, N, K), dtype of `v`. Half precisions are accumulated in float32, also under autocast.

    Raises:
        ValueError: unknown `normalizer`, or shapes that differ.
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r}: expected one of {', '.join(map(repr, NORMALIZERS))}")
    if not q.shape == k.shape == v.shape or q.dim() != 4:
        raise ValueError(
            "q, k, v: expected one common shape (B, H, N, K), got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    dtype = v.dtype
    accumulation = accumulation_dtype(dtype)
    with without_autocast(v):
        q_BHNK, k_BHNK, v_BHNK = q.to(accumulation), k.to(accumulation), v.to(accumulation)
        # 1/N on both terms cancels in either normaliser and keeps the sum's squared norm inside any dtype's range.
        per_token = 1.0 / v.shape[-2]
        khat_BHNK = k_BHNK * inverse_norm(k_BHNK)
        kv_BHKK = khat_BHNK.transpose(-2, -1) @ v_BHNK * (per_token / math.pi)
        angular_BHNK = q_BHNK @ kv_BHKK * inverse_norm(q_BHNK)
        if normalizer == "l2":
            total_BHNK = angular_BHNK + v_BHNK * (0.5 * per_token)
            if aux is not None:
                total_BHNK = total_BHNK + aux.out.to(accumulation) * per_token
            return (total_BHNK * inverse_norm(total_BHNK)).to(dtype)
        ksum_BHK1 = khat_BHNK.sum(dim=-2).unsqueeze(-1) * (per_token / math.pi)
        weight_BHN1 = 0.5 + q_BHNK @ ksum_BHK1 * inverse_norm(q_BHNK)
        average_BHNK = (angular_BHNK + 0.5 * v_BHNK.mean(dim=-2, keepdim=True)) / weight_BHN1
        if aux is not None:
            mass_BHN1 = aux.kept_mass.to(accumulation).unsqueeze(-1)
            average_BHNK = (average_BHNK + aux.out.to(accumulation)) / (1.0 + mass_BHN1)
        return average_BHNK.to(dtype)
