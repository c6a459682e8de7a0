"""A convolutional stem in place of the patch embedding, after LeViT (arXiv 2104.01136)."""

from __future__ import annotations

import math

from torch import nn

__all__ = ["ConvStem"]


class ConvStem(nn.Sequential):
    """3x3 convolutions of stride 2, each with BatchNorm, all but the last with GELU: the map is halved to `stride`.

    Maps an image (B, in_channels, H, W) to (B, embed_dims, H / stride, W / stride). Widths
    double up to `embed_dims`: C/8, C/4, C/2, C for a stride of 16.

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
