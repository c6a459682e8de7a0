"""Attention layers that exist to be compared with: the published formulation, and a hybrid with an N x N matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers import CastlingAttention
from castling_det.ops import MaskedSoftmax, linear_angular_attention

__all__ = ["DenseAttention", "PublishedAttention", "attention_layers", "rebuilt", "replace_attention"]

AttentionT = TypeVar("AttentionT", bound=CastlingAttention)


class PublishedAttention(CastlingAttention):
    """Linear mode the way the published block computes it: permuted q, k, v, norms without eps, no 1/N."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class's, with `mode="linear"`, `normalizer="l2"` and `local_conv="tokens"`."""
        assert self.dconv is not None and self.dconv.kind == "tokens"
        batch, tokens, _ = qkv.shape
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, self.dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q / q.norm(dim=-1, keepdim=True)
        k = k / k.norm(dim=-1, keepdim=True)
        x: Tensor = 0.5 * v + 1.0 / math.pi * torch.matmul(q, torch.matmul(k.transpose(-2, -1), v))
        x = x / x.norm(dim=-1, keepdim=True)
        x = x + F.conv2d(v, self.dconv.weight, padding=(4, 0), groups=self.num_heads)
        return x.transpose(1, 2).reshape(batch, tokens, self.dim)


class DenseAttention(CastlingAttention):
    """Castling mode with the masked softmax branch as plain tensor operations, so that autograd keeps N x N tensors."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class's, always with the masked softmax branch."""
        assert self.dconv is not None
        q_BNHK, k_BNHK, v_BNHK = qkv.unflatten(-1, (3, self.num_heads, self.dim // self.num_heads)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q_BNHK, k_BNHK, v_BNHK))
        p = torch.softmax(q.shape[-1] ** -0.5 * (q @ k.transpose(-2, -1)), dim=-1)
        mask = p > self.mask_state.absolute(p.shape[-1])
        sparse = p * mask
        aux = MaskedSoftmax(sparse @ v, sparse.sum(dim=-1), mask.float().mean())
        local: Tensor = self.dconv(v_BNHK.flatten(-2), hw)
        y_BHNK = linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux)
        return y_BHNK.transpose(1, 2).flatten(-2) + local


def rebuilt(layer: CastlingAttention, attention: type[AttentionT], **changes: Any) -> AttentionT:
    """A new `attention` with the options of `layer` but for `changes`; parameters are newly initialised."""
    options: dict[str, Any] = {
        "qkv_bias": layer.qkv.bias is not None,
        "num_prefix_tokens": layer.num_prefix_tokens,
        "proj_drop": layer.proj_drop.p,
        "options": layer.options,
    }
    return attention(layer.dim, layer.num_heads, **{**options, **changes})


def replace_attention(model: nn.Module, make: Callable[[CastlingAttention], CastlingAttention]) -> None:
    """Puts `make(layer)` in the place of every attention layer inside `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CastlingAttention):
                setattr(parent, name, make(child))


def attention_layers(model: nn.Module) -> dict[str, CastlingAttention]:
    """The attention layers of `model` by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CastlingAttention)}
