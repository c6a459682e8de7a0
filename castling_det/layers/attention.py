"""Castling attention: softmax, linear-angular, or both while training, behind one set of parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.local_conv import build_local_conv
from castling_det.layers.options import AttentionOptions, MaskState
from castling_det.ops import MaskedSoftmax, linear_angular_packed, masked_softmax_packed

__all__ = ["CastlingAttention", "HeadInputs", "MaskStats", "MaskedAttention", "attention_layers"]


class MaskStats(NamedTuple):
    """What the mask kept in the last forward; 0-d float tensors without gradient, in [0, 1]."""

    kept_fraction: Tensor
    """Share of the M x N probabilities that are above the threshold."""
    kept_mass: Tensor
    """Sum of the probabilities above the threshold, averaged over the rows."""


class HeadInputs(NamedTuple):
    """Queries, keys and values of an attention layer, head by head: M queries over N keys."""

    q: Tensor
    """(B, H, M, K)."""
    k: Tensor
    """(B, H, N, K)."""
    v: Tensor
    """(B, H, N, V)."""
    bias: Tensor | None
    """Position biases that softmax mode adds to the logits, broadcastable to (B, H, M, N), or None."""
    query_hw: tuple[int, int]
    """Height and width of the queries' grid, without prefix tokens."""
    key_hw: tuple[int, int]
    """Height and width of the keys' grid, without prefix tokens."""
    num_prefix_tokens: int = 0
    """Tokens before the tokens of the grids; queries and keys have the same number."""
    query_stride: int = 1
    """Distance from one query to the next on the layer's map, in tokens."""
    key_stride: int = 1
    """Distance from one key to the next on the layer's map, in tokens."""


class MaskedAttention(nn.Module):
    """Base of every attention whose softmax branch vanishes in training: its options and the state of its mask.

    `attention_layers` finds layers by this class.

    Args:
        options: None takes the defaults.
        by_name: fields of `AttentionOptions` that replace those of `options`.

    Attributes:
        mask_state: where the mask stands; `MaskAnnealingHook` sets it before every training iteration.
        eval_aux: whether the softmax branch stays in eval mode.
        mask_stats: what the mask kept in the last forward with the branch; None before.

    Raises:
        TypeError: a name that is no option.
    """

    def __init__(self, options: AttentionOptions | None, by_name: Mapping[str, Any]) -> None:
        super().__init__()
        self.options = dataclasses.replace(options or AttentionOptions(), **by_name)
        self.mode = self.options.mode
        self.eval_aux = self.options.eval_aux
        self.mask_state = MaskState(float(self.options.threshold), self.options.threshold_unit)
        self.mask_stats: MaskStats | None = None

    @property
    def centers_keys(self) -> bool:
        """Whether the forward subtracts the mean from the keys. Softmax mode does not: its output would not change."""
        return self.options.center_keys and self.mode != "softmax"

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """The queries, keys and values that the forward makes of tokens `x` on a map of size `hw`."""
        raise NotImplementedError

    def values_at_queries(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Moves tokens (B, N, C) from the grid of the keys to the grid of the queries, (B, M, C); a linear map.

        Applied to the values it gives the term v/2 of `normalizer="l2"`. `hw` is the size of the layer's map.
        """
        return x

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return str(self.options)

    def _check_tokens(self, x: Tensor, hw: tuple[int, int], dim: int, num_prefix_tokens: int = 0) -> None:
        if not torch.compiler.is_compiling() and 0 in x.shape:
            raise ValueError(f"x: expected at least one image and one token, got {tuple(x.shape)}; leave it out")
        if x.shape[1] != num_prefix_tokens + hw[0] * hw[1] or x.shape[2] != dim:
            prefix = f"{num_prefix_tokens} + " if num_prefix_tokens else ""
            raise ValueError(
                f"x: expected (B, {prefix}{hw[0]} * {hw[1]}, {dim}) for hw={tuple(hw)}, got {tuple(x.shape)}; "
                "pass the height and width of the map that x was flattened from"
            )

    def _masked_branch(
        self, branch: Callable[..., MaskedSoftmax], *inputs: Tensor, num_keys: int
    ) -> MaskedSoftmax | None:
        """The softmax branch, scaled, or None where mode and mask switch it off; updates `mask_stats`."""
        if self.mode != "castling" or not (self.training or self.eval_aux):
            return None
        if self.mask_state.is_empty(num_keys):
            zero = torch.zeros((), device=inputs[0].device)
            self.mask_stats = MaskStats(zero, zero)
            return None
        aux = branch(*inputs, self.mask_state.absolute(num_keys))
        self.mask_stats = MaskStats(aux.kept_fraction, aux.kept_mass.detach().float().mean())
        scale = self.mask_state.aux_scale
        if scale == 1:
            return aux
        return aux._replace(out=aux.out * scale, kept_mass=aux.kept_mass * scale)


class CastlingAttention(MaskedAttention):
    """Multi-head self-attention of Castling-ViT (arXiv 2211.10526) on a feature map of any size.

    Modes share the parameters `qkv`, `proj` and `dconv`, so that a state dict loads from one into another:

    - `"softmax"`: scaled dot-product attention plus the local convolution: a baseline that differs from the other modes
      only in the attention. Its `dconv` starts at zero, so that it starts as the plain softmax layer.
    - `"linear"`: linear-angular attention plus the local convolution. This mode is deployed.
    - `"castling"`: `"linear"`, and in training also the masked softmax branch. In eval mode it computes the same as
      `"linear"`, unless `eval_aux` keeps the branch in order to measure the difference.

    Args:
        dim: channels C.
        num_heads: heads, dividing `dim`.
        qkv_bias: whether `qkv` has a bias. Published: False; ViTs: True.
        num_prefix_tokens: tokens before the height * width ones (class token, registers).
        proj_drop: dropout rate after the projection, in [0, 1).
        options: mode, normaliser, local convolution and mask; None takes the defaults.
        by_name: fields of `AttentionOptions`, in place of those of `options`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        num_prefix_tokens: int = 0,
        proj_drop: float = 0.0,
        options: AttentionOptions | None = None,
        **by_name: Any,
    ) -> None:
        super().__init__(options, by_name)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: expected a divisor of dim={dim}; change num_heads or embed_dims")
        self.dim = dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dconv = build_local_conv(self.options, dim, num_heads, num_prefix_tokens=num_prefix_tokens)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Attends over all tokens.

        Args:
            x: tokens, (B, N, C) with N = num_prefix_tokens + height * width, raster order.
            hw: height and width of the feature map.

        Returns:
            (B, N, C).
        """
        self._check_tokens(x, hw, self.dim, self.num_prefix_tokens)
        out: Tensor = self.proj_drop(self.proj(self.attend(self.project(x), hw)))
        return out

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """As in `MaskedAttention`; x is (B, N, C)."""
        q, k, v = self.project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return HeadInputs(q, k, v, None, hw, hw, self.num_prefix_tokens)

    def project(self, x: Tensor) -> Tensor:
        """Maps tokens (B, N, C) to packed queries, keys (centred if the options say so) and values, (B, N, 3 * C)."""
        qkv: Tensor = self.qkv(x)
        if not self.centers_keys:
            return qkv
        mean_B1C = qkv[..., self.dim : 2 * self.dim].mean(dim=1, keepdim=True)
        # Subtracting zero from queries and values copies less than splitting the parts and stacking them again.
        return qkv - F.pad(mean_B1C, (self.dim, self.dim))

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """Attention and local convolution: everything between `project` and `proj`.

        Args:
            qkv: the result of `project`, (B, N, 3 * C).
            hw: height and width of the feature map.

        Returns:
            Merged heads, (B, N, C).
        """
        qkv_BN3HK = qkv.unflatten(-1, (3, self.num_heads, self.dim // self.num_heads))
        local = None if self.dconv is None else partial(self._local, hw=hw)
        if self.mode != "softmax":
            aux = self._masked_branch(masked_softmax_packed, qkv_BN3HK, num_keys=qkv.shape[1])
            normalizer = self.options.normalizer
            return linear_angular_packed(qkv_BN3HK, normalizer=normalizer, aux=aux, local=local).flatten(-2)
        q_BNHK, k_BNHK, v_BNHK = qkv_BN3HK.unbind(2)
        y_BHNK = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q_BNHK, k_BNHK, v_BNHK)))
        y: Tensor = y_BHNK.transpose(1, 2).flatten(-2)
        return y if local is None else y + local(v_BNHK).flatten(-2)

    def _local(self, v_BNHK: Tensor, hw: tuple[int, int]) -> Tensor:
        assert self.dconv is not None
        y_BNHK: Tensor = self.dconv(v_BNHK.flatten(-2), hw).unflatten(-1, v_BNHK.shape[-2:])
        return y_BNHK


def attention_layers(model: nn.Module, mode: str | None = None) -> dict[str, MaskedAttention]:
    """The attention layers of a detector or backbone, which may be wrapped for distributed training.

    Args:
        model: searched in its `backbone` where it has one.
        mode: only layers of this mode; None for all.

    Returns:
        Layers by the name of their block within the backbone, such as `blocks.3`.
    """
    unwrapped = getattr(model, "module", model)
    backbone: nn.Module = getattr(unwrapped, "backbone", unwrapped)
    return {
        name.removesuffix(".attn"): module
        for name, module in backbone.named_modules()
        if isinstance(module, MaskedAttention) and mode in (None, module.mode)
    }
