"""The slow twins: the N x N form in float64, one definition each, for parity. Signatures as in the fast ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from castling_det.ops.masked_softmax import MaskedSoftmax
from castling_det.ops.numerics import EPS

__all__ = [
    "linear_angular_attention",
    "linear_angular_weights",
    "masked_softmax",
    "masked_softmax_attention",
    "softmax_weights",
]


def linear_angular_weights(q: Tensor, k: Tensor) -> Tensor:
    """cos(q, k)/pi of every query and key, (B, H, M, N) in float64; 0 for a zero query or key."""
    unit_q, unit_k = (F.normalize(x.double(), dim=-1, eps=EPS) for x in (q, k))
    return unit_q @ unit_k.transpose(-2, -1) / math.pi


def softmax_weights(q: Tensor, k: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias), (B, H, M, N) in float64; `scale` is 1 / sqrt(K) unless given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * (q.double() @ k.double().transpose(-2, -1))
    return torch.softmax(logits if bias is None else logits + bias.double(), dim=-1)


def linear_angular_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalizer: str = "l2",
    aux: MaskedSoftmax | None = None,
    v_at_q: Tensor | None = None,
) -> Tensor:
    """Twin of `castling_det.ops.linear_angular_attention`, O(N^2); zero tokens are not defined here."""
    v64, weights = v.double(), linear_angular_weights(q, k)
    if normalizer == "l2":
        own64 = v64 if v_at_q is None else v_at_q.double()
        total = own64 / 2 + weights @ v64
        if aux is not None:
            total = total + aux.out.double()
        normalised: Tensor = total / total.norm(dim=-1, keepdim=True)
        return normalised.to(v.dtype)
    similarity = 0.5 + weights
    average = similarity / similarity.sum(dim=-1, keepdim=True) @ v64
    if aux is not None:
        average = (average + aux.out.double()) / (1 + aux.kept_mass.double().unsqueeze(-1))
    return average.to(v.dtype)


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """Twin of `castling_det.ops.masked_softmax`, with the whole M x N matrix."""
    p = softmax_weights(q, k, scale=scale)
    kept = p > threshold
    sparse = p * kept
    return MaskedSoftmax((sparse @ v.double()).to(v.dtype), sparse.sum(dim=-1), kept.double().mean().float())


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `castling_det.ops.masked_softmax_attention`."""
    result = masked_softmax(q, k, v, threshold, scale=scale)
    return result.out, result.kept_fraction
