"""The depthwise convolution on the values that stands beside linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from castling_det.layers.options import AttentionOptions

__all__ = ["LocalConv", "local_conv"]

_TOKEN_KERNEL_SIZE = 9
"""Published: nine taps along the flattened token axis."""


class LocalConv(nn.Conv2d):
    """Depthwise convolution of the values, without bias (the projection after it has one).

    `kind="tokens"` is the published one: a (9, 1) kernel a head along the raster order of all tokens, shared by the
    head's channels; it wraps round image rows. `kind="image"` is a k x k kernel a channel on the feature map; prefix
    tokens have no place on the map and get zero.

    Args:
        dim: channels C.
        num_heads: heads H, dividing `dim`.
        kind: `"tokens"` or `"image"`.
        kernel_size: odd k of `"image"`.
        num_prefix_tokens: tokens before the H x W ones.
    """

    def __init__(
        self, dim: int, num_heads: int, *, kind: str = "image", kernel_size: int = 3, num_prefix_tokens: int = 0
    ) -> None:
        if kind == "tokens":
            taps = _TOKEN_KERNEL_SIZE
            super().__init__(num_heads, num_heads, (taps, 1), padding=(taps // 2, 0), groups=num_heads, bias=False)
        else:
            super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)
        self.kind = kind
        self.dim = dim
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, v: Tensor, hw: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Convolves values (B, N, C), channels ordered by head, and returns (B, N, C)."""
        batch, tokens, dim = v.shape
        if self.kind == "tokens":
            v_BHNK = v.reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
            return super().forward(v_BHNK).transpose(1, 2).reshape(batch, tokens, dim)
        prefix = self.num_prefix_tokens
        image = v[:, prefix:].reshape(batch, *hw, dim).permute(0, 3, 1, 2)
        y = super().forward(image).permute(0, 2, 3, 1).reshape(batch, tokens - prefix, dim)
        return torch.nn.functional.pad(y, (0, 0, prefix, 0)) if prefix else y

    def macs(self, num_tokens: int) -> int:
        """Multiply-adds for one sequence of `num_tokens`, borders counted in full."""
        taps = self.kernel_size[0] * self.kernel_size[1]
        if self.kind == "tokens":
            return taps * num_tokens * self.dim
        return taps * (num_tokens - self.num_prefix_tokens) * self.dim


def local_conv(options: AttentionOptions, dim: int, num_heads: int, *, num_prefix_tokens: int = 0) -> LocalConv | None:
    """The local convolution that the options ask for."""
    if options.local_conv is None:
        return None
    kind, kernel_size = options.local_conv, options.local_conv_kernel_size
    return LocalConv(dim, num_heads, kind=kind, kernel_size=kernel_size, num_prefix_tokens=num_prefix_tokens)
