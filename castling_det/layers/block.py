"""The pre-norm transformer block of a plain ViT around castling attention."""

from __future__ import annotations

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from castling_det.layers.attention import CastlingAttention

__all__ = ["CastlingBlock"]


class CastlingBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`; parameter names as in timm's ViT block.

    Args:
        attn: the attention layer; its `dim` is the block's.
        mlp_ratio: hidden width of the MLP over `dim`.
        init_values: initial layer scale (DINOv2: 1e-5), or None for no layer scale.
        drop: dropout rate in the MLP, in [0, 1).
        drop_path: stochastic depth rate of both branches, in [0, 1).
        norm_eps: eps of the two LayerNorms; timm and DeiT 1e-6.
    """

    def __init__(
        self,
        attn: CastlingAttention,
        *,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim = attn.dim
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = LayerScale(dim, init_values=init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values=init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Maps tokens (B, N, C) of a map of size `hw` to (B, N, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), hw)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]
