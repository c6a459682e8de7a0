"""The parts of a plain ViT around its attention: the pre-norm transformer block and a convolutional stem."""

from __future__ import annotations

import math

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import CastlingAttention

__all__ = ["CastlingBlock", "ConvStem"]


class CastlingBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`; parameter names as in timm's ViT block.

    Args:
        attn: the attention layer; its `dim` is the block's.
        mlp_ratio: hidden width of the MLP over `dim`.
        init_values: initial layer scale (DINOv2: 1e-5), or None for no layer scale.
        drop: dropout rate in the MLP, in [0, 1).
        drop_path: stochastic depth rate of both branches, in [0, 1).
        norm_eps: eps of the two LayerNorms; timm and DeiT 1e-6.
        window_size: side in tokens of the windows that confine the attention; 0 attends over the whole map. As in
            ViTDet, maps are padded with zeros to whole windows, and the attention sees the padding.
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
                f"window_size={window_size}: expected 0 (the whole map), or a window's side in tokens with "
                f"num_prefix_tokens=0 (no class token, no registers), got {attn.num_prefix_tokens} prefix tokens"
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


class ConvStem(nn.Sequential):
    """3x3 convolutions of stride 2 in place of the patch embedding, after LeViT (arXiv 2104.01136).

    Each has a BatchNorm, and all but the last a GELU. Maps an image (B, in_channels, H, W) to
    (B, embed_dims, H / stride, W / stride). Widths double up to `embed_dims`: C/8, C/4, C/2, C for a stride of 16.

    Args:
        in_channels: channels of the image.
        embed_dims: channels C of the tokens.
        stride: total stride, a power of two from 2 on.
    """

    def __init__(self, in_channels: int, embed_dims: int, *, stride: int) -> None:
        steps = int(math.log2(stride)) if stride > 1 else 0
        if steps < 1 or 2**steps != stride:
            raise ValueError(f"patch_size={stride}: a convolutional stem needs a power of two, such as 8 or 16")
        if embed_dims % 2 ** (steps - 1):
            raise ValueError(
                f"embed_dims={embed_dims}: a convolutional stem of stride {stride} needs a multiple of "
                f"{2 ** (steps - 1)}"
            )
        layers: list[nn.Module] = []
        for step in range(steps):
            out_channels = embed_dims // 2 ** (steps - 1 - step)
            layers += [
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
            ]
            if step < steps - 1:
                layers.append(nn.GELU())
            in_channels = out_channels
        super().__init__(*layers)
