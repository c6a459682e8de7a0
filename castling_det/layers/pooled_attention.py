"""MViTv2's pooling attention (arXiv 2112.01526) with softmax, linear-angular or castling attention inside.

Parameter names are those of timm's MultiScaleAttention (Apache-2.0), so that its weights load by key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import HeadInputs, MaskedAttention
from castling_det.layers.local_conv import local_conv
from castling_det.layers.options import AttentionOptions
from castling_det.layers.relative_position import relative_position_logits, table_length
from castling_det.ops import linear_angular_attention, masked_softmax

__all__ = ["PooledAttention", "pooled_hw"]

_KERNEL_SIZE = 3
_NORM_EPS = 1e-6


def pooled_hw(hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """The grid that pooling with `stride` leaves of one of height and width `hw`; halves are rounded up."""
    return -(-hw[0] // stride), -(-hw[1] // stride)


class PooledAttention(MaskedAttention):
    """Multi-head attention between queries, keys and values that depthwise convolutions have pooled.

    Queries keep every `stride_q`-th place of the map, keys and values every `stride_kv`-th, so that queries may be more
    or fewer than values. The pooled queries are added to the output (residual pooling). Modes:

    - `"softmax"`: as in MViTv2, with decomposed relative positions, plus the local convolution, which starts at zero.
    - `"linear"`: linear-angular attention plus the local convolution; relative positions are N x N logits and have no
      place in it.
    - `"castling"`: `"linear"`, and while training the masked softmax of q k^T (without positions) beside it.

    Where the grids of queries and values differ, v/2 and the local convolution, which are terms of the value at the
    query's own place, are brought from the values' grid to the queries': a query takes the value of the coarser cell
    that it lies in, or the mean of the finer cells that it covers. Where the grids agree this is the published formula.

    `"linear"` and `"castling"` share all parameters, and `"softmax"` has those and `rel_pos_h`, `rel_pos_w`.

    Args:
        dim: channels of the input.
        num_heads: heads, dividing `dim_out`.
        dim_out: channels C of queries, keys, values and output; None is `dim`.
        stride_q: pooling stride of the queries. Of the two strides, one is a multiple of the other.
        stride_kv: pooling stride of keys and values.
        grid: height and width of the map that the tables of `"softmax"` are kept for; others interpolate them.
        qkv_bias: whether `qkv` has a bias.
        options, by_name: as in `CastlingAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dim_out: int | None = None,
        stride_q: int = 1,
        stride_kv: int = 1,
        grid: tuple[int, int] = (14, 14),
        qkv_bias: bool = True,
        options: AttentionOptions | None = None,
        **by_name: Any,
    ) -> None:
        super().__init__(options, by_name)
        dim_out = dim if dim_out is None else dim_out
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads={num_heads}: expected a divisor of dim_out={dim_out}; change one of them")
        if min(stride_q, stride_kv) < 1 or max(stride_q, stride_kv) % min(stride_q, stride_kv):
            raise ValueError(
                f"stride_q={stride_q}, stride_kv={stride_kv}: expected positive numbers of which one divides the other"
            )
        self.dim = dim
        self.dim_out = dim_out
        self.num_heads = num_heads
        self.stride_q = stride_q
        self.stride_kv = stride_kv
        head_dim = dim_out // num_heads
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        self.pool_q, self.norm_q = _pooling(head_dim, stride_q)
        self.pool_k, self.norm_k = _pooling(head_dim, stride_kv)
        self.pool_v, self.norm_v = _pooling(head_dim, stride_kv)
        self.dconv = local_conv(self.options, dim_out, num_heads)
        if self.mode == "softmax":
            lengths = (table_length(*sizes) for sizes in zip(*self.grids(grid), strict=True))
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.empty(length, head_dim)) for length in lengths)
            nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
            nn.init.trunc_normal_(self.rel_pos_w, std=0.02)
            if self.dconv is not None:
                nn.init.zeros_(self.dconv.weight)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Attends over all tokens.

        Args:
            x: tokens, (B, height * width, dim), raster order.
            hw: height and width of the feature map.

        Returns:
            Tokens at the queries' places, (B, M, C), and the height and width of their grid.
        """
        if x.shape[1] != hw[0] * hw[1] or x.shape[2] != self.dim:
            raise ValueError(
                f"x: expected (B, {hw[0]} * {hw[1]}, {self.dim}) for hw={tuple(hw)}, got {tuple(x.shape)}; "
                "pass the height and width of the map that x was flattened from"
            )
        q, k, v, logits, query_hw, key_hw, *_ = self.head_inputs(x, hw)
        if self.mode == "softmax":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=logits)
        else:
            aux = self._masked_branch(masked_softmax, q, k, v, num_keys=k.shape[2])
            v_at_q = self._at_queries(_merged(v), query_hw, key_hw).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            y = linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux, v_at_q=v_at_q)
        merged = _merged(y + q)
        if self.dconv is not None:
            merged = merged + self._at_queries(self.dconv(_merged(v), key_hw), query_hw, key_hw)
        out: Tensor = self.proj(merged)
        return out, query_hw

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """As in `MaskedAttention`; x is (B, N, dim), and q, k, v are pooled."""
        query_hw, key_hw = self.grids(hw)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = _pooled(q, hw, self.pool_q, self.norm_q)
        k = _pooled(k, hw, self.pool_k, self.norm_k)
        v = _pooled(v, hw, self.pool_v, self.norm_v)
        if self.centers_keys:
            k = k - k.mean(dim=2, keepdim=True)
        logits = None
        if self.mode == "softmax":
            logits = relative_position_logits(q, query_hw, key_hw, self.rel_pos_h, self.rel_pos_w)
        strides = {"query_stride": self.stride_q, "key_stride": self.stride_kv}
        return HeadInputs(q, k, v, logits, query_hw, key_hw, **strides)

    def values_at_queries(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """The value of the coarser cell that a query lies in, or the mean of the finer cells that it covers."""
        return self._at_queries(x, *self.grids(hw))

    def grids(self, hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the queries' and of the keys' grid, for a map of height and width `hw`."""
        return pooled_hw(hw, self.stride_q), pooled_hw(hw, self.stride_kv)

    def _at_queries(self, x_BNC: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int]) -> Tensor:
        """Tokens on the values' grid, brought to the queries': (B, M, C)."""
        if query_hw == key_hw:
            return x_BNC
        image = x_BNC.transpose(1, 2).unflatten(2, key_hw)
        if self.stride_kv > self.stride_q:
            # Cells at the border may reach beyond the map.
            image = F.interpolate(image, scale_factor=self.stride_kv // self.stride_q, mode="nearest")
            image = image[..., : query_hw[0], : query_hw[1]]
        else:
            ratio = self.stride_q // self.stride_kv
            image = F.avg_pool2d(image, ratio, ceil_mode=True, count_include_pad=False)
        return image.flatten(2).transpose(1, 2)

    def macs(self, hw: tuple[int, int]) -> dict[str, int]:
        """Multiply-adds of the deployed forward for one map of height and width `hw`, by kind.

        With M queries and N keys. Softmax: q k^T and p v, M * N * C each, and each query times the vectors of its row
        and column distances, M * (height + width of the keys' grid) * C. Linear: k^T v, N * K * C, and q (k^T v),
        M * K * C, and under the `"kernel"` normaliser the sum of keys, N * C, and the row sums, M * C. Norms, scalings,
        additions and what brings values to the queries' places are not multiply-adds and count zero.
        """
        query_hw, key_hw = self.grids(hw)
        queries, keys = query_hw[0] * query_hw[1], key_hw[0] * key_hw[1]
        counts = {
            "projections": (hw[0] * hw[1] * self.dim * 3 + queries * self.dim_out) * self.dim_out,
            "pooling": _KERNEL_SIZE**2 * (queries + 2 * keys) * self.dim_out,
            "local_conv": self.dconv.macs(keys) if self.dconv is not None else 0,
        }
        if self.mode == "softmax":
            scores = values = queries * keys * self.dim_out
            counts["relative_positions"] = queries * sum(key_hw) * self.dim_out
        else:
            columns = self.dim_out // self.num_heads + (self.options.normalizer == "kernel")
            scores, values = keys * self.dim_out * columns, queries * self.dim_out * columns
        return {**counts, "attention_scores": scores, "attention_values": values}

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return f"{self.options}, num_heads={self.num_heads}, stride_q={self.stride_q}, stride_kv={self.stride_kv}"


def _pooling(head_dim: int, stride: int) -> tuple[nn.Conv2d, nn.LayerNorm]:
    conv = nn.Conv2d(
        head_dim, head_dim, _KERNEL_SIZE, stride=stride, padding=_KERNEL_SIZE // 2, groups=head_dim, bias=False
    )
    return conv, nn.LayerNorm(head_dim, eps=_NORM_EPS)


def _pooled(x_BHNK: Tensor, hw: tuple[int, int], pool: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
    """The heads share the convolution and the norm of one head's channels."""
    batch, num_heads, _, head_dim = x_BHNK.shape
    image = x_BHNK.transpose(2, 3).reshape(batch * num_heads, head_dim, *hw)
    pooled: Tensor = norm(pool(image).flatten(2).transpose(1, 2)).unflatten(0, (batch, num_heads))
    return pooled


def _merged(x_BHNK: Tensor) -> Tensor:
    return x_BHNK.transpose(1, 2).flatten(-2)
