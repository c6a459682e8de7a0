"""The pre-norm transformer block of a plain ViT around castling attention."""

from __future__ import annotations

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

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
        window_size: side of the windows that the attention is confined to, in tokens; 0 attends over the whole map.
            Maps are padded with zeros to whole windows, and those tokens join in, as in ViTDet.
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
        window_size: int = 0,
    ) -> None:
        super().__init__()
        if window_size < 0 or (window_size and attn.num_prefix_tokens):
            raise ValueError(
                f"window_size={window_size}: expected 0 (the whole map) or the tokens on a window's side, and those "
                f"only without class token and registers, of which there are {attn.num_prefix_tokens}"
            )
        self.window_size = window_size
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
        x = x + self.drop_path1(self.ls1(self._attended(self.norm1(x), hw)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]

    def _attended(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        side = self.window_size
        if not side:
            return self.attn(x, hw)  # type: ignore[no-any-return]
        (height, width), (batch, _, dim) = hw, x.shape
        image = F.pad(x.unflatten(1, hw), (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = image.shape[1] // side, image.shape[2] // side
        windows = image.unflatten(1, (rows, side)).unflatten(3, (columns, side)).transpose(2, 3)
        y: Tensor = self.attn(windows.reshape(-1, side * side, dim), (side, side))
        y = y.view(batch, rows, columns, side, side, dim).transpose(2, 3).reshape(image.shape)
        return y[:, :height, :width].flatten(1, 2)
