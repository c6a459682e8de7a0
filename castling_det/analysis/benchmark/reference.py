"""The float64 twin of a model: every attention layer written out from its equations. Uses none of the package's ops."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from castling_det.analysis.benchmark.attentions import PublishedAttention, rebuilt, replace_attention
from castling_det.layers import CastlingAttention

__all__ = ["ReferenceAttention", "reference_of"]

_BLOCK_ELEMENTS = 1 << 23
"""Probabilities alive at once, 64 MiB in float64: with their gradients and copies the peak stays well under 1 GiB."""

_KEEP_ALL = -1.0
"""A threshold under every probability: the masked softmax is softmax."""


class ReferenceAttention(CastlingAttention):
    """Any mode of the base class, term by term; softmax as the explicit N x N matrix, by blocks of queries."""

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """As the base class's."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        if self.mode == "softmax":
            y, _ = _kept_softmax(q, k, v, _KEEP_ALL)
        elif self.options.normalizer == "l2":
            y = self._unit_sum(q, k, v)
        else:
            y = self._average(q, k, v)
        if self.dconv is not None:
            y = y + self._local(v, hw)
        return y.transpose(1, 2).flatten(-2)

    @property
    def _masked(self) -> bool:
        return self.mode == "castling" and self.training

    def _unit_sum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = v / 2 + _unit(q) @ (_unit(k).transpose(-2, -1) @ v) / math.pi
        if self._masked:
            total = total + _kept_softmax(q, k, v, self.mask_state.absolute(v.shape[2]))[0]
        return _unit(total)

    def _average(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        khat, tokens = _unit(k), v.shape[2]
        weighted = v.sum(dim=2, keepdim=True) / 2 + _unit(q) @ (khat.transpose(-2, -1) @ v) / math.pi
        weights = tokens / 2 + _unit(q) @ khat.sum(dim=2).unsqueeze(-1) / math.pi
        if not self._masked:
            return weighted / weights
        out, mass = _kept_softmax(q, k, v, self.mask_state.absolute(tokens))
        return (weighted / weights + out) / (1 + mass)

    def _local(self, v: Tensor, hw: tuple[int, int]) -> Tensor:
        assert self.dconv is not None
        weight, prefix = self.dconv.weight, self.num_prefix_tokens
        if self.dconv.kind == "tokens":
            return F.conv2d(v, weight, padding=(weight.shape[2] // 2, 0), groups=self.num_heads)
        image = v[:, :, prefix:].transpose(2, 3).reshape(v.shape[0], self.dim, *hw)
        y = F.conv2d(image, weight, padding=weight.shape[2] // 2, groups=self.dim)
        return F.pad(y.unflatten(1, (self.num_heads, -1)).flatten(3).transpose(2, 3), (0, 0, prefix, 0))


def reference_of(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64, weights, mode of training and all, with `ReferenceAttention` in it.

    The published formulation has no eps and no mask to write differently: it is its own reference.
    """
    twin = copy.deepcopy(module).double()
    if isinstance(twin, CastlingAttention):
        return _reference_layer(twin)
    replace_attention(twin, _reference_layer)
    return twin


def _reference_layer(layer: CastlingAttention) -> CastlingAttention:
    if isinstance(layer, PublishedAttention):
        return layer
    twin = rebuilt(layer, ReferenceAttention).to(layer.qkv.weight)
    twin.load_state_dict(layer.state_dict())
    return twin.train(layer.training)


def _unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(dim=-1, keepdim=True).sqrt()


def _kept_softmax(q: Tensor, k: Tensor, v: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """`(p * [p > threshold]) @ v` and the kept mass of each row, (B, H, N, 1)."""
    blocks = [
        # Recomputed in backward: the graph of all blocks together would hold every N x N tensor.
        checkpoint(_kept_rows, q[:, :, rows], k, v, threshold, use_reentrant=False)
        for rows in _query_blocks(q)
    ]
    out, mass = zip(*blocks, strict=True)
    return torch.cat(out, dim=2), torch.cat(mass, dim=2)


def _kept_rows(q: Tensor, k: Tensor, v: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    p = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    sparse = torch.where(p > threshold, p, 0.0)
    return sparse @ v, sparse.sum(dim=-1, keepdim=True)


def _query_blocks(q: Tensor) -> Iterator[slice]:
    batch, num_heads, tokens, _ = q.shape
    rows = max(1, _BLOCK_ELEMENTS // (batch * num_heads * tokens))
    for start in range(0, tokens, rows):
        yield slice(start, start + rows)
