"""Keys without their mean over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["centered_keys", "centered_keys_packed"]


def centered_keys(k: Tensor) -> Tensor:
    """`k_j - mean_j k_j`: the same softmax attention, and another linear-angular one.

    Softmax does not see what all keys share, which moves the logits of a row alike. A cosine does: keys that share a
    mean all point about the same way, and every query gets about the same average of the values. Without it, the
    weights `1/2 + cos/pi` follow the first order of softmax at that mean, `(1 + q (k_j - mean)) / N`.

    Args:
        k: keys, (B, H, N, K), any float dtype.

    Returns:
        (B, H, N, K), of the same dtype.
    """
    return k - k.mean(dim=-2, keepdim=True)


def centered_keys_packed(qkv: Tensor) -> Tensor:
    """`centered_keys` on a packed projection; queries and values stay.

    Args:
        qkv: queries, keys and values, (B, N, 3, H, K), any float dtype. Where no gradient is recorded it is changed in
            place and returned.

    Returns:
        (B, N, 3, H, K), of the same dtype.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        q_BNHK, k_BNHK, v_BNHK = qkv.unbind(2)
        return torch.stack((q_BNHK, k_BNHK - k_BNHK.mean(dim=1, keepdim=True), v_BNHK), dim=2)
    if torch.is_grad_enabled():
        centered: Tensor = _CenteredKeys.apply(qkv)  # type: ignore[no-untyped-call]
        return centered
    return _center_keys_(qkv)


class _CenteredKeys(torch.autograd.Function):
    """A projection equals its transpose, so that the gradient is centred as the keys were.

    Left to autograd, the gradient of the keys' mean is written out for all of `qkv` and added up.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        return _center_keys_(qkv.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return centered_keys_packed(grad) if torch.is_grad_enabled() else _center_keys_(grad.clone())


def _center_keys_(qkv_BN3HK: Tensor) -> Tensor:
    k_BNHK = qkv_BN3HK[:, :, 1]
    k_BNHK -= k_BNHK.mean(dim=1, keepdim=True)
    return qkv_BN3HK
