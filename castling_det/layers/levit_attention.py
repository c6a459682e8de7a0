"""LeViT's attention (arXiv 2104.01136) with softmax and position biases, linear, or castling.

Parameter names and the order of channels follow facebookresearch/LeViT and timm (Apache-2.0): linear layers are
followed by BatchNorm, and a projection holds query, key and value head by head. Tokens are (B, N, C), the raster order
of a map of `hw` = (height, width).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from timm.models.levit import LinearNorm
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import HeadInputs, MaskedAttention
from castling_det.layers.local_conv import build_local_conv, strided, strided_hw
from castling_det.layers.options import AttentionOptions
from castling_det.ops import linear_angular_attention, masked_softmax

__all__ = ["LevitAttention", "resized_biases"]


class LevitAttention(MaskedAttention):
    """Attention over all tokens of a map; its queries are all of them, or only every second row and column.

    Values are `attn_ratio` times as wide as keys. Modes, with y the merged heads, then Hardswish and projection:

    - `"softmax"`: `y = softmax(q k^T / sqrt(K) + bias) v + dconv(v)`, with a bias for each head and distance
      (|dy|, |dx|). `dconv` starts at zero, so that it starts as LeViT's layer.
    - `"linear"`: the published block, `y = l2(v/2 + (1/pi) q^ (k^T v)) + dconv(v)`. It has no position biases, because
      they would need the N x N matrix.
    - `"castling"`: `"linear"`, and in training also the masked softmax branch, without biases.

    With fewer queries than tokens, v/2 and dconv(v) are evaluated only at the places of the queries. The convolution,
    which then has their stride, still reads all values around them.

    Modes share all parameters except `attention_biases`, which only `"softmax"` has.

    Args:
        in_dim: channels of the input.
        out_dim: channels of the output.
        key_dim: channels K of a head's queries and keys.
        num_heads: heads H.
        attn_ratio: channels of a head's values over `key_dim`.
        query_stride: 1, or 2 for queries at every second row and column.
        resolution: height and width of the map that the biases are stored for; other maps interpolate them.
        options, by_name: as in `CastlingAttention`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        key_dim: int,
        num_heads: int,
        attn_ratio: float = 2.0,
        query_stride: int = 1,
        resolution: int = 14,
        options: AttentionOptions | None = None,
        **by_name: Any,
    ) -> None:
        super().__init__(options, by_name)
        if min(key_dim, num_heads, query_stride) < 1:
            raise ValueError(
                f"key_dim={key_dim}, num_heads={num_heads}, query_stride={query_stride}: expected positive numbers"
            )
        self.in_dim = in_dim
        self.key_dim = key_dim
        self.value_dim = int(attn_ratio * key_dim)
        self.num_heads = num_heads
        self.query_stride = query_stride
        self.resolution = resolution
        keys_dim, values_dim = num_heads * key_dim, num_heads * self.value_dim
        if query_stride == 1:
            self.qkv = LinearNorm(in_dim, 2 * keys_dim + values_dim)
        else:
            self.kv = LinearNorm(in_dim, keys_dim + values_dim)
            self.q = nn.Sequential(OrderedDict([("ln", LinearNorm(in_dim, keys_dim))]))
        self.dconv = build_local_conv(self.options, values_dim, num_heads, stride=query_stride)
        # Between stages no residual connection bypasses the attention, so there it must not start at zero.
        projection = LinearNorm(values_dim, out_dim, bn_weight_init=0 if query_stride == 1 else 1)
        self.proj = nn.Sequential(OrderedDict([("act", nn.Hardswish()), ("ln", projection)]))
        if self.mode == "softmax":
            self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, M, C'), the tokens on the grid of the queries.

        Raises:
            ValueError: the shape of `x` does not fit `hw`.
        """
        self._check_tokens(x, hw, self.in_dim)
        out: Tensor = self.proj(self.attend(*self._projected(x, hw), hw))
        return out

    def _projected(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, M, H, K), keys (B, N, H, K), centred if the options say so, and values (B, N, H, V)."""
        if self.query_stride == 1:
            heads = self.qkv(x).unflatten(-1, (self.num_heads, -1))
            q_BMHK, k_BNHK, v_BNHV = heads.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        else:
            heads = self.kv(x).unflatten(-1, (self.num_heads, -1))
            k_BNHK, v_BNHV = heads.split([self.key_dim, self.value_dim], dim=-1)
            q_BMHK = self.q(strided(x, hw, self.query_stride)).unflatten(-1, (self.num_heads, -1))
        if self.centers_keys:
            k_BNHK = k_BNHK - k_BNHK.mean(dim=1, keepdim=True)
        return q_BMHK, k_BNHK, v_BNHV

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """As in `MaskedAttention`; x is (B, N, C)."""
        q, k, v = (part.transpose(1, 2) for part in self._projected(x, hw))
        bias = self.biases(hw) if self.mode == "softmax" else None
        return HeadInputs(q, k, v, bias, strided_hw(hw, self.query_stride), hw, query_stride=self.query_stride)

    def values_at_queries(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """As in `MaskedAttention`: keeps every `query_stride`-th row and column of the map."""
        return strided(x, hw, self.query_stride)

    def attend(self, q_BMHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, hw: tuple[int, int]) -> Tensor:
        """Attention and local convolution: everything between the projections.

        Args:
            q_BMHK: queries, (B, M, H, K).
            k_BNHK: keys, (B, N, H, K).
            v_BNHV: values, (B, N, H, V).
            hw: height and width of the map of the N tokens.

        Returns:
            Merged heads, (B, M, H * V).
        """
        q, k, v = (x.transpose(1, 2) for x in (q_BMHK, k_BNHK, v_BNHV))
        if self.mode == "softmax":
            y_BHMV = F.scaled_dot_product_attention(q, k, v, attn_mask=self.biases(hw).to(q.dtype))
        else:
            aux = self._masked_branch(masked_softmax, q, k, v, num_keys=k.shape[2])
            own = strided(v_BNHV, hw, self.query_stride).transpose(1, 2)
            y_BHMV = linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux, v_at_q=own)
        y: Tensor = y_BHMV.transpose(1, 2).flatten(-2)
        return y if self.dconv is None else y + self.dconv(v_BNHV.flatten(-2), hw)

    def biases(self, hw: tuple[int, int]) -> Tensor:
        """Position biases of softmax mode on a map of size `hw`: (1, H, M, N)."""
        table_HYX = resized_biases(self.attention_biases, hw).unflatten(-1, hw)
        rows, columns = (_distances(size, self.query_stride, table_HYX.device) for size in hw)
        gathered: Tensor = table_HYX[:, rows[:, None, :, None], columns[None, :, None, :]]
        return gathered.flatten(3).flatten(1, 2).unsqueeze(0)


def resized_biases(table: Tensor, hw: tuple[int, int]) -> Tensor:
    """Interpolates biases by distance (|dy|, |dx|) from (H, R * R) to a map of size `hw`, (H, height * width).

    Bilinear with aligned corners: distance 0 and the longest distance keep their biases.
    """
    resolution = round(table.shape[1] ** 0.5)
    # In a graph for every size this shortcut would be a special case of one size, which a compiler refuses.
    if not torch.compiler.is_compiling() and tuple(hw) == (resolution, resolution):
        return table
    image = table.unflatten(-1, (resolution, resolution)).unsqueeze(0)
    return F.interpolate(image, size=hw, mode="bilinear", align_corners=True)[0].flatten(1)


def _distances(size: int, stride: int, device: torch.device) -> Tensor:
    """|i - j| between each `stride`-th place i and every place j of an axis, int64."""
    places = torch.arange(size, device=device)
    return (places[::stride, None] - places).abs()
