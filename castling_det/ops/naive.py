"""The slow twins: the N x N form in float64, one definition each, for parity. Signatures as in the fast ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from castling_det.ops.masked_softmax import MaskedSoftmax

__all__ = ["linear_angular_attention", "masked_softmax", "masked_softmax_attention"]


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
    q64, k64, v64 = q.double(), k.double(), v.double()
    cosine = torch.nn.functional.cosine_similarity(q64.unsqueeze(-2), k64.unsqueeze(-3), dim=-1, eps=0)
    if normalizer == "l2":
        own64 = v64 if v_at_q is None else v_at_q.double()
        total = own64 / 2 + cosine @ v64 / math.pi
        if aux is not None:
            total = total + aux.out.double()
        normalised: Tensor = total / total.norm(dim=-1, keepdim=True)
        return normalised.to(v.dtype)
    similarity = 0.5 + cosine / math.pi
    weights = similarity / similarity.sum(dim=-1, keepdim=True)
    average = weights @ v64
    if aux is not None:
        average = (average + aux.out.double()) / (1 + aux.kept_mass.double().unsqueeze(-1))
    return average.to(v.dtype)


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None) -> MaskedSoftmax:
    """Twin of `castling_det.ops.masked_softmax`, with the whole M x N matrix."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = torch.softmax(scale * (q.double() @ k.double().transpose(-2, -1)), dim=-1)
    kept = p > threshold
    sparse = p * kept
    return MaskedSoftmax((sparse @ v.double()).to(v.dtype), sparse.sum(dim=-1), kept.double().mean().float())


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, threshold: float, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Twin of `castling_det.ops.masked_softmax_attention`."""
    result = masked_softmax(q, k, v, threshold, scale=scale)
    return result.out, result.kept_fraction
