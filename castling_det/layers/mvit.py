"""MViTv2 (arXiv 2112.01526) with softmax, linear-angular or castling attention: pooling attention and its block.

Parameter names are those of timm's MultiScaleAttention and MultiScaleBlock (Apache-2.0), so that their weights load.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import HeadInputs, MaskedAttention
from castling_det.layers.local_conv import build_local_conv, strided_hw
from castling_det.layers.options import AttentionOptions
from castling_det.ops import linear_angular_attention, masked_softmax

__all__ = ["PooledAttention", "PooledBlock", "relative_position_logits", "resized_table"]

_KERNEL_SIZE = 3
_NORM_EPS = 1e-6


class PooledAttention(MaskedAttention):
    """Multi-head attention between queries, keys and values that are pooled by strided depthwise convolutions.

    Queries are pooled with `stride_q`, keys and values with `stride_kv`, so that there may be more queries than values
    or fewer. The pooled queries are added to the output (residual pooling). Modes:

    - `"softmax"`: as in MViTv2, with decomposed relative positions, plus the local convolution, which starts at zero.
    - `"linear"`: linear-angular attention plus the local convolution. It has no relative positions, because they would
      need the N x N matrix.
    - `"castling"`: `"linear"`, and in training also the masked softmax branch, without positions.

    v/2 and the local convolution need a value at each query's own place. Where the grids of queries and values differ,
    a query takes the value of the coarser cell that it lies in, or the mean of the finer cells that it covers. Where
    the grids are equal this is the published formula.

    Modes share all parameters except `rel_pos_h` and `rel_pos_w`, which only `"softmax"` has.

    Args:
        dim: channels of the input.
        num_heads: heads, dividing `dim_out`.
        dim_out: channels C of queries, keys, values and output; None is `dim`.
        stride_q: pooling stride of the queries. Of the two strides, one is a multiple of the other.
        stride_kv: pooling stride of keys and values.
        grid: height and width of the map that the position tables are stored for; other maps interpolate them.
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
        self.dconv = build_local_conv(self.options, dim_out, num_heads)
        if self.mode == "softmax":
            lengths = (_table_length(*sizes) for sizes in zip(*self.grids(grid), strict=True))
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.empty(length, head_dim)) for length in lengths)
            nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
            nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Attends over all tokens.

        Args:
            x: tokens, (B, height * width, dim), raster order.
            hw: height and width of the feature map.

        Returns:
            Tokens on the grid of the queries, (B, M, C), and the height and width of that grid.
        """
        self._check_tokens(x, hw, self.dim)
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
        """As in `MaskedAttention`: the value of the cell that a query lies in, or the mean of those that it covers."""
        return self._at_queries(x, *self.grids(hw))

    def grids(self, hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the grid of the queries and of the grid of the keys, for a map of size `hw`."""
        return strided_hw(hw, self.stride_q), strided_hw(hw, self.stride_kv)

    def _at_queries(self, x_BNC: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int]) -> Tensor:
        """Moves tokens from the grid of the values to the grid of the queries: (B, M, C)."""
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


class PooledBlock(nn.Module):
    """MViTv2's block: `x = shortcut(x) + attn(norm1(x))`, then `x + mlp(norm2(x))`.

    The shortcut is `x`, or a projection of `norm1(x)` where the attention changes the channels. It is max-pooled with
    the query stride where that is above 1.

    Args:
        attn: the attention layer; its `dim` and `dim_out` are the block's.
        mlp_ratio: hidden width of the MLP over `dim_out`.
        drop_path: stochastic depth rate of both branches, in [0, 1).
        norm_eps: eps of the two LayerNorms.
    """

    def __init__(
        self, attn: PooledAttention, *, mlp_ratio: float = 4.0, drop_path: float = 0.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        dim, dim_out, stride = attn.dim, attn.dim_out, attn.stride_q
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.shortcut_proj_attn = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.shortcut_pool_attn = nn.MaxPool2d(stride + 1, stride, (stride + 1) // 2) if stride > 1 else None
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim_out, eps=norm_eps)
        self.mlp = Mlp(dim_out, hidden_features=int(dim_out * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Maps tokens (B, N, dim) of a map of size `hw` to (B, M, dim_out) and the size of their map."""
        normed = self.norm1(x)
        shortcut = x if self.shortcut_proj_attn is None else self.shortcut_proj_attn(normed)
        if self.shortcut_pool_attn is not None:
            shortcut = self.shortcut_pool_attn(shortcut.transpose(1, 2).unflatten(2, hw)).flatten(2).transpose(1, 2)
        attended, hw = self.attn(normed, hw)
        x = shortcut + self.drop_path1(attended)
        return x + self.drop_path2(self.mlp(self.norm2(x))), hw


def _pooling(head_dim: int, stride: int) -> tuple[nn.Conv2d, nn.LayerNorm]:
    conv = nn.Conv2d(
        head_dim, head_dim, _KERNEL_SIZE, stride=stride, padding=_KERNEL_SIZE // 2, groups=head_dim, bias=False
    )
    return conv, nn.LayerNorm(head_dim, eps=_NORM_EPS)


def _pooled(x_BHNK: Tensor, hw: tuple[int, int], pool: nn.Conv2d, norm: nn.LayerNorm) -> Tensor:
    """Pools every head with the same convolution and norm over the channels of one head."""
    batch, num_heads, _, head_dim = x_BHNK.shape
    image = x_BHNK.transpose(2, 3).reshape(batch * num_heads, head_dim, *hw)
    pooled: Tensor = norm(pool(image).flatten(2).transpose(1, 2)).unflatten(0, (batch, num_heads))
    return pooled


def _merged(x_BHNK: Tensor) -> Tensor:
    return x_BHNK.transpose(1, 2).flatten(-2)


def _table_length(query_size: int, key_size: int) -> int:
    """Number of distances along one axis between `query_size` queries and `key_size` keys over the same length."""
    return 2 * max(query_size, key_size) - 1


def resized_table(table: Tensor, length: int) -> Tensor:
    """Interpolates a table (L, K) linearly to another number of distances, (length, K), as MViTv2 does."""
    if table.shape[0] == length:
        return table
    return F.interpolate(table.t().unsqueeze(0), size=length, mode="linear")[0].t()


def relative_position_logits(
    q: Tensor, query_hw: tuple[int, int], key_hw: tuple[int, int], rel_pos_h: Tensor, rel_pos_w: Tensor
) -> Tensor:
    """MViTv2's decomposed relative positions: each query times the vectors of its row and column distance to the key.

    Args:
        q: queries, (B, H, M, K), M = height * width of `query_hw`, not scaled.
        query_hw: height and width of the grid of the queries.
        key_hw: height and width of the grid of the keys, over the same image.
        rel_pos_h: vectors of the row distances, (L, K), from the most negative to the most positive distance.
        rel_pos_w: vectors of the column distances, in the same order. Tables of another grid are interpolated.

    Returns:
        Summands of the logits, (B, H, M, N).
    """
    q_map = q.unflatten(2, query_hw)
    rows = torch.einsum("bhyxk,yjk->bhyxj", q_map, _vectors(rel_pos_h, query_hw[0], key_hw[0]))
    columns = torch.einsum("bhyxk,xjk->bhyxj", q_map, _vectors(rel_pos_w, query_hw[1], key_hw[1]))
    return (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(4).flatten(2, 3)


def _vectors(table: Tensor, query_size: int, key_size: int) -> Tensor:
    """The vector of each pair of a query and a key on one axis, (query_size, key_size, K)."""
    table = resized_table(table, _table_length(query_size, key_size))
    # Distances are counted in steps of the finer grid.
    query_step, key_step = max(key_size / query_size, 1.0), max(query_size / key_size, 1.0)
    places = torch.arange(query_size, device=table.device)[:, None] * query_step
    distances = places - torch.arange(key_size, device=table.device)[None, :] * key_step
    return table[(distances + (key_size - 1) * key_step).long()]
