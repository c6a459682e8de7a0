"""The published attention block, written from its equations, one token and head at a time, in float64.

`y = l2(aux + v/2 + (1/pi) q^ (k^T v)) + dwconv(v)`, `aux = (p * [p > eps]) @ v`, `p = softmax(q k^T / sqrt(K))`;
no eps in the norms, so zero tokens are outside its domain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def published_attention(q: Tensor, k: Tensor, v: Tensor, threshold: float | None) -> Tensor:
    """The part before the convolution, (B, H, N, K); `threshold=None` leaves the softmax branch out."""
    batch, heads, tokens, channels = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            khat = torch.stack([key / key.norm() for key in k[b, h]])
            state = sum(torch.outer(khat[j], v[b, h, j]) for j in range(tokens))
            for i in range(tokens):
                qhat = q[b, h, i] / q[b, h, i].norm()
                total = v[b, h, i] / 2 + qhat @ state / math.pi
                if threshold is not None:
                    p = torch.softmax(k[b, h] @ q[b, h, i] / math.sqrt(channels), dim=0)
                    for j in range(tokens):
                        if p[j] > threshold:
                            total = total + p[j] * v[b, h, j]
                rows.append(total / total.norm())
    return torch.stack(rows).reshape(batch, heads, tokens, channels)


def published_token_conv(v: Tensor, weight: Tensor) -> Tensor:
    """Nine taps along the tokens, one filter a head, zeros beyond the ends; v (B, H, N, K), weight (H, 1, 9, 1)."""
    tokens = v.shape[2]
    out = torch.zeros_like(v)
    for tap in range(9):
        for i in range(tokens):
            j = i + tap - 4
            if 0 <= j < tokens:
                out[:, :, i] = out[:, :, i] + weight[None, :, 0, tap, 0, None] * v[:, :, j]
    return out


def published_block(x: Tensor, parameters: dict[str, Tensor], num_heads: int, threshold: float | None) -> Tensor:
    """The whole block on tokens x (B, N, C), with the published parameter names."""
    batch, tokens, dim = x.shape
    qkv = x @ parameters["qkv.weight"].T
    if "qkv.bias" in parameters:
        qkv = qkv + parameters["qkv.bias"]
    q, k, v = (
        part.reshape(batch, tokens, num_heads, dim // num_heads).transpose(1, 2) for part in qkv.split(dim, dim=-1)
    )
    y = published_attention(q, k, v, threshold) + published_token_conv(v, parameters["dconv.weight"])
    return y.transpose(1, 2).reshape(batch, tokens, dim) @ parameters["proj.weight"].T + parameters["proj.bias"]
