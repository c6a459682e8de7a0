"""Linear-angular attention (Castling-ViT, arXiv 2211.10526): the angular kernel without its residual, O(N K^2)."""

from __future__ import annotations

import math

from torch import Tensor

from castling_det.ops.masked_softmax import MaskedSoftmax
from castling_det.ops.numerics import accumulation_dtype, inverse_of, vector_norm, without_autocast

__all__ = ["NORMALIZERS", "linear_angular_attention", "linear_angular_tokens"]

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
    q_BNHK, k_BNHK, v_BNHK = (x.transpose(1, 2) for x in (q, k, v))
    return linear_angular_tokens(q_BNHK, k_BNHK, v_BNHK, normalizer=normalizer, aux=aux).transpose(1, 2)


def linear_angular_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "l2",
    aux: MaskedSoftmax | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`linear_angular_attention` on the layout of a packed projection, so that nothing is permuted or merged by copy.

    Args:
        q: queries, (B, N, H, K), any strides.
        k: keys, (B, N, H, K).
        v: values, (B, N, H, K).
        normalizer: `"l2"` or `"kernel"`.
        aux: the masked softmax branch, its tensors (B, H, N, K) and (B, H, N), or None.
        norms: `packed_norms` of q and k where they lie in one tensor; None computes them.
        residual: what is added to the result, (B, N, H, K), such as the local convolution; overwritten.

    Returns:
        (B, N, H, K), dtype of `v`.
    """
    dtype = v.dtype
    accumulation = accumulation_dtype(dtype)
    with without_autocast(v):
        q_BNHK, k_BNHK, v_BNHK = q.to(accumulation), k.to(accumulation), v.to(accumulation)
        q_norm_BNH1, k_norm_BNH1 = norms if norms is not None else (vector_norm(q_BNHK), vector_norm(k_BNHK))
        # 1/N on both terms cancels in either normaliser and keeps the sum's squared norm inside any dtype's range.
        per_token = 1.0 / v.shape[1]
        qhat_BNHK = q_BNHK * inverse_of(q_norm_BNH1)
        khat_BNHK = k_BNHK * (inverse_of(k_norm_BNH1) * (per_token / math.pi))
        kv_BHKK = khat_BNHK.permute(0, 2, 3, 1) @ v_BNHK.transpose(1, 2)
        total_BNHK = (qhat_BNHK.transpose(1, 2) @ kv_BHKK).transpose(1, 2)
        if normalizer == "l2":
            total_BNHK.add_(v_BNHK, alpha=0.5 * per_token)
            if aux is not None:
                total_BNHK.add_(aux.out.to(accumulation).transpose(1, 2), alpha=per_token)
            factor_BNH1 = inverse_of(vector_norm(total_BNHK))
        else:
            total_BNHK.add_(0.5 * v_BNHK.mean(dim=1, keepdim=True))
            ksum_BHK1 = khat_BNHK.sum(dim=1).unsqueeze(-1)
            factor_BNH1 = (0.5 + qhat_BNHK.transpose(1, 2) @ ksum_BHK1).transpose(1, 2).reciprocal()
            if aux is not None:
                share_BNH1 = 1.0 / (1.0 + aux.kept_mass.to(accumulation).transpose(1, 2).unsqueeze(-1))
                total_BNHK = total_BNHK + aux.out.to(accumulation).transpose(1, 2) / factor_BNH1
                factor_BNH1 = factor_BNH1 * share_BNH1
        # Autograd keeps the total for the backward of its norm; without it the product may take its place.
        out_BNHK = total_BNHK * factor_BNH1 if total_BNHK.requires_grad else total_BNHK.mul_(factor_BNH1)
        return out_BNHK.to(dtype) if residual is None else residual.add_(out_BNHK)
