"""Castling attention: softmax, linear-angular, or both while training, behind one set of parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.local_conv import LocalConv
from castling_det.ops import (
    NORMALIZERS,
    MaskedSoftmax,
    centered_keys_packed,
    linear_angular_packed,
    masked_softmax_packed,
    native,
)

__all__ = ["ATTENTION_MODES", "THRESHOLD_UNITS", "CastlingAttention", "HeadInputs", "MaskStats", "MaskedAttention"]

ATTENTION_MODES = ("softmax", "linear", "castling")
THRESHOLD_UNITS = ("absolute", "uniform")


class MaskStats(NamedTuple):
    """What the mask kept in the last forward; 0-d float tensors without gradient, in [0, 1]."""

    kept_fraction: Tensor
    """Share of the probabilities, one for each query and key, that are above the threshold."""
    kept_mass: Tensor
    """Mean over rows of the probability that is kept."""


class HeadInputs(NamedTuple):
    """What an attention layer attends with, head by head: M queries over N keys."""

    q: Tensor
    """(B, H, M, K)."""
    k: Tensor
    """(B, H, N, K)."""
    v: Tensor
    """(B, H, N, V)."""
    bias: Tensor | None
    """What softmax mode adds to the logits, broadcastable to (B, H, M, N); None for nothing."""
    query_hw: tuple[int, int]
    """Height and width of the queries' grid, without prefix tokens."""
    key_hw: tuple[int, int]
    """Height and width of the keys' grid, without prefix tokens."""
    num_prefix_tokens: int = 0
    """Tokens before those of the grids, of queries and keys alike."""
    query_stride: int = 1
    """Places of the layer's map from one query to the next."""
    key_stride: int = 1
    """Places of the layer's map from one key to the next."""


class MaskedAttention(nn.Module):
    """What every attention with a vanishing softmax branch shares: its mode and the state of its mask.

    By this class `MaskAnnealingHook` and conversion find their layers.

    Args:
        mode: `"softmax"`, `"linear"` or `"castling"`.
        normalizer: `"l2"` (published) or `"kernel"`, see `castling_det.ops.linear_angular_attention`.
        center_keys: take the mean over the tokens from the keys, which softmax does not see and a cosine does; see
            `castling_det.ops.centered_keys`. Published: False. Nothing changes in `"softmax"`.
        threshold: probabilities above it are kept by the mask; published 0.02.
        threshold_unit: `"absolute"` (published), or `"uniform"`: multiples of 1/N, the probability of a uniform row.
        eval_aux: keep the masked softmax branch in eval mode.

    Attributes:
        threshold, aux_scale: where the mask stands; the branch is multiplied by `aux_scale` >= 0.
        mask_stats: what the mask kept in the last forward with the branch; None before.
    """

    def __init__(
        self,
        *,
        mode: str,
        normalizer: str,
        center_keys: bool,
        threshold: float,
        threshold_unit: str,
        eval_aux: bool,
    ) -> None:
        super().__init__()
        _check_choice("mode", mode, ATTENTION_MODES)
        _check_choice("normalizer", normalizer, NORMALIZERS)
        _check_choice("threshold_unit", threshold_unit, THRESHOLD_UNITS)
        if not threshold >= 0:
            raise ValueError(f"threshold={threshold}: expected a number >= 0 in the unit {threshold_unit!r}")
        if eval_aux and mode != "castling":
            raise ValueError(f"eval_aux=True: only mode='castling' has the softmax branch, got mode={mode!r}")
        self.mode = mode
        self.normalizer = normalizer
        self.center_keys = center_keys
        self.threshold = float(threshold)
        self.threshold_unit = threshold_unit
        self.aux_scale = 1.0
        self.eval_aux = eval_aux
        self.mask_stats: MaskStats | None = None

    @property
    def centers_keys(self) -> bool:
        """Whether the forward takes the mean from the keys: in softmax mode it would change nothing."""
        return self.center_keys and self.mode != "softmax"

    def absolute_threshold(self, num_tokens: int) -> float:
        """The threshold as a probability for rows over `num_tokens` keys."""
        return self.threshold / num_tokens if self.threshold_unit == "uniform" else self.threshold

    def mask_is_empty(self, num_tokens: int) -> bool:
        """Whether nothing passes, whatever the input: threshold >= 1 in probability, or the branch faded out."""
        return self.absolute_threshold(num_tokens) >= 1 or self.aux_scale == 0

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """Queries, keys and values of tokens `x` on a map of size `hw`, as the forward makes them."""
        raise NotImplementedError

    def values_at_queries(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) at the keys' places, brought to the queries', (B, M, C); linear. `hw`: as in `head_inputs`.

        Of the values it gives what v/2 of `normalizer="l2"` is taken from.
        """
        return x

    def _masked_branch(
        self, branch: Callable[..., MaskedSoftmax], *inputs: Tensor, num_keys: int
    ) -> MaskedSoftmax | None:
        """`branch(*inputs, threshold)` where mode and mask ask for it, scaled; leaves its statistics."""
        if self.mode != "castling" or not (self.training or self.eval_aux):
            return None
        if self.mask_is_empty(num_keys):
            zero = torch.zeros((), device=inputs[0].device)
            self.mask_stats = MaskStats(zero, zero)
            return None
        aux = branch(*inputs, self.absolute_threshold(num_keys))
        self.mask_stats = MaskStats(aux.kept_fraction, aux.kept_mass.detach().float().mean())
        if self.aux_scale == 1:
            return aux
        return aux._replace(out=aux.out * self.aux_scale, kept_mass=aux.kept_mass * self.aux_scale)


class CastlingAttention(MaskedAttention):
    """Multi-head self-attention of Castling-ViT (arXiv 2211.10526) on a feature map of any size.

    Modes share the parameters `qkv`, `proj` and `dconv`, so that a state dict loads from one into another:

    - `"softmax"`: scaled dot-product attention plus the local convolution, the baseline that differs from the others in
      the attention alone. Its `dconv` starts at zero: at initialisation it is the plain softmax layer.
    - `"linear"`: linear-angular attention plus the local convolution; what is deployed.
    - `"castling"`: `"linear"`, and while training the masked softmax branch beside it. In eval mode it computes what
      will be deployed, unless `eval_aux` asks for the branch in order to measure the gap.

    Args:
        dim: channels C.
        num_heads: heads, dividing `dim`.
        qkv_bias: whether `qkv` has a bias. Published: False; ViTs: True.
        mode: `"softmax"`, `"linear"` or `"castling"`.
        normalizer: `"l2"` (published) or `"kernel"`, see `castling_det.ops.linear_angular_attention`.
        center_keys: as in `MaskedAttention`; published False.
        local_conv: `"image"`, `"tokens"` (published), or None for no local convolution in any mode.
        local_conv_kernel_size: odd k of `local_conv="image"`.
        threshold: probabilities above it are kept by the mask; published 0.02.
        threshold_unit: `"absolute"` (published), or `"uniform"`: multiples of 1/N, the probability of a uniform row.
        eval_aux: keep the masked softmax branch in eval mode.
        num_prefix_tokens: tokens before the height * width ones (class token, registers).
        proj_drop: dropout rate after the projection, in [0, 1).

    Attributes:
        native: take the compiled kernel of `castling_det.ops.native` where one was built; False: plain operations.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        mode: str = "castling",
        normalizer: str = "l2",
        center_keys: bool = False,
        local_conv: str | None = "image",
        local_conv_kernel_size: int = 3,
        threshold: float = 0.02,
        threshold_unit: str = "absolute",
        eval_aux: bool = False,
        num_prefix_tokens: int = 0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(
            mode=mode,
            normalizer=normalizer,
            center_keys=center_keys,
            threshold=threshold,
            threshold_unit=threshold_unit,
            eval_aux=eval_aux,
        )
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads}: expected a divisor of dim={dim}; change num_heads or embed_dims")
        self.dim = dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.native = True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.dconv = (
            LocalConv(
                dim, num_heads, kind=local_conv, kernel_size=local_conv_kernel_size, num_prefix_tokens=num_prefix_tokens
            )
            if local_conv is not None
            else None
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if mode == "softmax" and self.dconv is not None:
            nn.init.zeros_(self.dconv.weight)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Attends over all tokens.

        Args:
            x: tokens, (B, N, C) with N = num_prefix_tokens + height * width, raster order.
            hw: height and width of the feature map.

        Returns:
            (B, N, C).
        """
        _, tokens, dim = x.shape
        if tokens != self.num_prefix_tokens + hw[0] * hw[1] or dim != self.dim:
            raise ValueError(
                f"x: expected (B, {self.num_prefix_tokens} + {hw[0]} * {hw[1]}, {self.dim}) for hw={tuple(hw)}, "
                f"got {tuple(x.shape)}; pass the height and width of the map that x was flattened from"
            )
        out: Tensor = self.proj_drop(self.proj(self.attend(self.project(x), hw)))
        return out

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """As in `MaskedAttention`; x is (B, N, C)."""
        q, k, v = self.project(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return HeadInputs(q, k, v, None, hw, hw, self.num_prefix_tokens)

    def project(self, x: Tensor) -> Tensor:
        """Packed queries, keys (centred) and values of tokens (B, N, C), each of them head by head: (B, N, 3 * C)."""
        qkv: Tensor = self.qkv(x)
        if not self.centers_keys:
            return qkv
        return centered_keys_packed(qkv.unflatten(-1, (3, self.num_heads, -1))).flatten(-3)

    def attend(self, qkv: Tensor, hw: tuple[int, int]) -> Tensor:
        """The core: everything between `project` and `proj`, local convolution included.

        Args:
            qkv: packed queries, keys and values, (B, N, 3 * C), as `project` gives them.
            hw: height and width of the feature map.

        Returns:
            Merged heads, (B, N, C).
        """
        qkv_BN3HK = qkv.unflatten(-1, (3, self.num_heads, self.dim // self.num_heads))
        local = None if self.dconv is None else partial(self._local, hw=hw)
        if self.mode != "softmax":
            aux = self._masked_branch(masked_softmax_packed, qkv_BN3HK, num_keys=qkv.shape[1])
            if aux is None and self._takes_kernel(qkv):
                weight = None if self.dconv is None else self.dconv.weight
                return native.linear_angular(qkv, weight, self.num_heads, hw, self.normalizer)
            return linear_angular_packed(qkv_BN3HK, normalizer=self.normalizer, aux=aux, local=local).flatten(-2)
        q_BNHK, k_BNHK, v_BNHK = qkv_BN3HK.unbind(2)
        y_BHNK = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q_BNHK, k_BNHK, v_BNHK)))
        y: Tensor = y_BHNK.transpose(1, 2).flatten(-2)
        return y if local is None else y + local(v_BNHK).flatten(-2)

    def _takes_kernel(self, qkv: Tensor) -> bool:
        on_image = self.dconv is None or self.dconv.kind == "image"
        weight = None if self.dconv is None else self.dconv.weight
        return self.native and on_image and native.usable(qkv, weight, self.num_heads)

    def _local(self, v_BNHK: Tensor, hw: tuple[int, int]) -> Tensor:
        assert self.dconv is not None
        y_BNHK: Tensor = self.dconv(v_BNHK.flatten(-2), hw).unflatten(-1, v_BNHK.shape[-2:])
        return y_BNHK

    def macs(self, num_tokens: int) -> dict[str, int]:
        """Multiply-adds of the deployed forward for one sequence of `num_tokens`, by kind.

        Softmax: q k^T and p v, N * N * C each. Linear: k^T v and q (k^T v), N * K * C each, and the row sums of the
        `"kernel"` normaliser, the weighted sum of the keys and its product with q, N * C each. Norms, scalings and
        additions are not multiply-adds and count zero.
        """
        if self.mode == "softmax":
            scores = values = num_tokens * num_tokens * self.dim
        else:
            values = num_tokens * self.dim * (self.dim // self.num_heads)
            scores = values + (2 * num_tokens * self.dim if self.normalizer == "kernel" else 0)
        return {
            "attention_scores": scores,
            "attention_values": values,
            "projections": 4 * num_tokens * self.dim * self.dim,
            "local_conv": self.dconv.macs(num_tokens) if self.dconv is not None else 0,
        }

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return (
            f"mode={self.mode!r}, normalizer={self.normalizer!r}, center_keys={self.center_keys}, "
            f"threshold={self.threshold}, threshold_unit={self.threshold_unit!r}, num_heads={self.num_heads}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
