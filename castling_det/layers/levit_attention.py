"""LeViT's attention (arXiv 2104.01136) with softmax and position biases, linear, or castling.

Names of parameters and order of channels are those of facebookresearch/LeViT and timm (Apache-2.0): linear layers are
followed by BatchNorm, and a projection holds query, key and value head by head. Tokens are (B, N, C), the raster order
of a map of `hw` = (height, width).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import HeadInputs, MaskedAttention
from castling_det.layers.linear_norm import LinearNorm
from castling_det.layers.local_conv import LocalConv
from castling_det.layers.options import AttentionOptions
from castling_det.ops import linear_angular_attention, masked_softmax

__all__ = ["LevitAttention", "resized_biases", "subsampled_hw"]


def subsampled_hw(hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of a map of which every `stride`-th row and column is kept, the first ones included."""
    return -(-hw[0] // stride), -(-hw[1] // stride)


class _QueryConv(LocalConv):
    """The rows of `LocalConv` that belong to the queries: every `query_stride`-th row and column of the map."""

    def __init__(self, dim: int, num_heads: int, *, kind: str, kernel_size: int, query_stride: int) -> None:
        super().__init__(dim, num_heads, kind=kind, kernel_size=kernel_size)
        self.query_stride = query_stride
        if kind == "image":
            self.stride = (query_stride, query_stride)

    def forward(self, v: Tensor, hw: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Maps values (B, N, C) to (B, M, C)."""
        if self.kind == "image":
            image: Tensor = nn.Conv2d.forward(self, v.unflatten(1, hw).permute(0, 3, 1, 2))
            return image.permute(0, 2, 3, 1).flatten(1, 2)
        return _subsampled(super().forward(v, hw), hw, self.query_stride)

    def macs_on(self, hw: tuple[int, int]) -> int:
        """Multiply-adds for one map of size `hw`, borders counted in full."""
        height, width = subsampled_hw(hw, self.query_stride) if self.kind == "image" else hw
        return self.macs(height * width)


class _KeptBiases(NamedTuple):
    """Gathered biases, and all that tells whether they are still those of a table on a map."""

    biases: Tensor
    table: Tensor
    state: tuple[object, ...]


class LevitAttention(MaskedAttention):
    """Attention of the tokens of a map, or of those in every second row and column, over all of its tokens.

    Values are `attn_ratio` times as wide as keys. Modes, with y the merged heads, then Hardswish and projection:

    - `"softmax"`: `y = softmax(q k^T / sqrt(K) + bias) v + dconv(v)`, with a bias for each head and distance
      (|dy|, |dx|). `dconv` starts at zero: at initialisation it is LeViT's layer.
    - `"linear"`: the published block, without position biases, which are N x N:
      `y = l2(v/2 + (1/pi) q^ (k^T v)) + dconv(v)`.
    - `"castling"`: `"linear"`, and while training the masked softmax branch, without biases too.

    Subsampled, it is the same block at the places of the queries only: v/2 and dconv(v) are taken there, the
    convolution (of that stride) still reads all the values around them.

    Modes share all parameters but `attention_biases`, which `"softmax"` alone has.

    Args:
        in_dim: channels of the input. out_dim: channels of the output.
        key_dim: channels K of a head's queries and keys.
        num_heads: heads H.
        attn_ratio: channels of a head's values over `key_dim`.
        query_stride: 1, or 2 for queries at every second row and column.
        resolution: height and width of the map that the biases are kept for; other maps interpolate them.
        options, by_name: as in `CastlingAttention`.

    Attributes:
        keep_biases: keep those of the last map's size instead of gathering them in each forward. For weights that
            no longer change; set by `fuse_norms`.
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
        self.keep_biases = False
        self._kept_biases: _KeptBiases | None = None
        keys_dim, values_dim = num_heads * key_dim, num_heads * self.value_dim
        if query_stride == 1:
            self.qkv = LinearNorm(in_dim, 2 * keys_dim + values_dim)
        else:
            self.kv = LinearNorm(in_dim, keys_dim + values_dim)
            self.q = nn.Sequential(OrderedDict([("ln", LinearNorm(in_dim, keys_dim))]))
        self.dconv: _QueryConv | None = None
        if self.options.local_conv is not None:
            self.dconv = _QueryConv(
                values_dim,
                num_heads,
                kind=self.options.local_conv,
                kernel_size=self.options.local_conv_kernel_size,
                query_stride=query_stride,
            )
        # Between stages there is no way round the attention: only inside them may it start as nothing.
        projection = LinearNorm(values_dim, out_dim, bn_weight_init=0.0 if query_stride == 1 else 1.0)
        self.proj = nn.Sequential(OrderedDict([("act", nn.Hardswish()), ("ln", projection)]))
        if self.mode == "softmax":
            self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
            if self.dconv is not None:
                nn.init.zeros_(self.dconv.weight)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, M, C'), those of the map of the queries.

        Raises:
            ValueError: `x` does not belong to `hw`.
        """
        if x.shape[1] != hw[0] * hw[1] or x.shape[2] != self.in_dim:
            raise ValueError(
                f"x: expected (B, {hw[0]} * {hw[1]}, {self.in_dim}) for hw={tuple(hw)}, got {tuple(x.shape)}; "
                "pass the height and width of the map that x was flattened from"
            )
        out: Tensor = self.proj(self.attend(*self._projected(x, hw), hw))
        return out

    def _projected(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, M, H, K), keys (B, N, H, K) and values (B, N, H, V); the keys centred."""
        if self.query_stride == 1:
            heads = self.qkv(x).unflatten(-1, (self.num_heads, -1))
            q_BMHK, k_BNHK, v_BNHV = heads.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        else:
            heads = self.kv(x).unflatten(-1, (self.num_heads, -1))
            k_BNHK, v_BNHV = heads.split([self.key_dim, self.value_dim], dim=-1)
            q_BMHK = self.q(_subsampled(x, hw, self.query_stride)).unflatten(-1, (self.num_heads, -1))
        if self.centers_keys:
            k_BNHK = k_BNHK - k_BNHK.mean(dim=1, keepdim=True)
        return q_BMHK, k_BNHK, v_BNHV

    def head_inputs(self, x: Tensor, hw: tuple[int, int]) -> HeadInputs:
        """As in `MaskedAttention`; x is (B, N, C)."""
        q, k, v = (part.transpose(1, 2) for part in self._projected(x, hw))
        bias = self.biases(hw) if self.mode == "softmax" else None
        return HeadInputs(q, k, v, bias, subsampled_hw(hw, self.query_stride), hw, query_stride=self.query_stride)

    def values_at_queries(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Every `query_stride`-th row and column of the map."""
        return _subsampled(x, hw, self.query_stride)

    def attend(self, q_BMHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, hw: tuple[int, int]) -> Tensor:
        """The core: everything between the projections, local convolution included.

        Args:
            q_BMHK: queries, (B, M, H, K) with M = N, or the subsampled places.
            k_BNHK: keys, (B, N, H, K).
            v_BNHV: values, (B, N, H, V).
            hw: height and width of the map of N tokens.

        Returns:
            Merged heads, (B, M, H * V).
        """
        q, k, v = (x.transpose(1, 2) for x in (q_BMHK, k_BNHK, v_BNHV))
        if self.mode == "softmax":
            y_BHMV = F.scaled_dot_product_attention(q, k, v, attn_mask=self.biases(hw).to(q.dtype))
        else:
            aux = self._masked_branch(masked_softmax, q, k, v, num_keys=k.shape[2])
            own = _subsampled(v_BNHV, hw, self.query_stride).transpose(1, 2)
            y_BHMV = linear_angular_attention(q, k, v, normalizer=self.options.normalizer, aux=aux, v_at_q=own)
        y: Tensor = y_BHMV.transpose(1, 2).flatten(-2)
        return y if self.dconv is None else y + self.dconv(v_BNHV.flatten(-2), hw)

    def biases(self, hw: tuple[int, int]) -> Tensor:
        """What softmax mode adds to the logits on a map of size `hw`: (1, H, M, N)."""
        if not self.keep_biases or torch.compiler.is_compiling():
            return self._gathered_biases(hw)
        table = self.attention_biases
        state = (tuple(hw), table._version, table.dtype, table.device)
        kept = self._kept_biases
        if kept is None or kept.table is not table or kept.state != state:
            kept = self._kept_biases = _KeptBiases(self._gathered_biases(hw).detach(), table, state)
        return kept.biases

    def _gathered_biases(self, hw: tuple[int, int]) -> Tensor:
        table_HYX = resized_biases(self.attention_biases, hw).unflatten(-1, hw)
        rows, columns = (_distances(size, self.query_stride, table_HYX.device) for size in hw)
        gathered: Tensor = table_HYX[:, rows[:, None, :, None], columns[None, :, None, :]]
        return gathered.flatten(3).flatten(1, 2).unsqueeze(0)

    def macs(self, hw: tuple[int, int]) -> dict[str, int]:
        """Multiply-adds of the deployed forward for one map of size `hw`, by kind.

        With N tokens, M of them queries, H heads of K and V channels. Softmax: q k^T and p v, M * N * H * K and
        M * N * H * V. Linear: k^T v and q (k^T v), N * H * K * V and M * H * K * V, and the row sums of the `"kernel"`
        normaliser, (N + M) * H * K. Norms, activations, additions and the interpolation of biases count zero.
        """
        tokens = hw[0] * hw[1]
        height, width = subsampled_hw(hw, self.query_stride)
        queries = height * width
        keys_dim, values_dim = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        if self.mode == "softmax":
            scores, values = queries * tokens * keys_dim, queries * tokens * values_dim
        else:
            row_sums = (tokens + queries) * keys_dim if self.options.normalizer == "kernel" else 0
            scores = tokens * keys_dim * self.value_dim + row_sums
            values = queries * keys_dim * self.value_dim
        out_dim = _out_features(self.proj[-1])
        inputs = tokens * (keys_dim + values_dim) + queries * keys_dim
        return {
            "attention_scores": scores,
            "attention_values": values,
            "projections": inputs * self.in_dim + queries * values_dim * out_dim,
            "local_conv": self.dconv.macs_on(hw) if self.dconv is not None else 0,
        }

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        return f"{self.options}, num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"


def resized_biases(table: Tensor, hw: tuple[int, int]) -> Tensor:
    """Biases by distance (|dy|, |dx|), (H, R * R), as those of a map of size `hw`: (H, height * width).

    Bilinear from corner to corner: distance 0 keeps its bias, the longest one too.
    """
    resolution = round(table.shape[1] ** 0.5)
    # A compiler would make a graph for this one size and refuse it in the graph for all the others.
    if not torch.compiler.is_compiling() and tuple(hw) == (resolution, resolution):
        return table
    image = table.unflatten(-1, (resolution, resolution)).unsqueeze(0)
    return F.interpolate(image, size=hw, mode="bilinear", align_corners=True)[0].flatten(1)


def _distances(size: int, stride: int, device: torch.device) -> Tensor:
    """|i - j| between each `stride`-th place i and every place j of an axis, int64."""
    places = torch.arange(size, device=device)
    return (places[::stride, None] - places).abs()


def _subsampled(x: Tensor, hw: tuple[int, int], stride: int) -> Tensor:
    """Tokens (B, N, ...) of every `stride`-th row and column of their map: (B, M, ...)."""
    return x if stride == 1 else x.unflatten(1, hw)[:, ::stride, ::stride].flatten(1, 2)


def _out_features(projection: nn.Module) -> int:
    linear = projection.linear if isinstance(projection, LinearNorm) else projection
    assert isinstance(linear, nn.Linear)
    return linear.out_features
