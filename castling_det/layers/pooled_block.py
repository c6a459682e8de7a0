"""MViTv2's block (arXiv 2112.01526): pooling attention and MLP, with a shortcut that is pooled like the queries."""

from __future__ import annotations

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from castling_det.layers.pooled_attention import PooledAttention

__all__ = ["PooledBlock"]


class PooledBlock(nn.Module):
    """`shortcut(x) + attn(norm1(x))`, then `x + mlp(norm2(x))`; parameter names as in timm's MViTv2 block.

    Where attention changes the channels, the shortcut is a projection of `norm1(x)`, else `x` itself; where it has a
    query stride, the shortcut is max-pooled by it.

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
