"""The depthwise convolution on the values that stands beside linear attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.options import AttentionOptions

__all__ = ["LocalConv", "build_local_conv", "strided", "strided_hw"]

_TOKEN_KERNEL_SIZE = 9
"""Published: nine taps along the flattened token axis."""


def strided_hw(hw: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width of a map of which every `stride`-th row and column is kept, the first ones included."""
    return -(-hw[0] // stride), -(-hw[1] // stride)


def strided(x: Tensor, hw: tuple[int, int], stride: int) -> Tensor:
    """Tokens (B, N, ...) of every `stride`-th row and column of their map: (B, M, ...)."""
    return x if stride == 1 else x.unflatten(1, hw)[:, ::stride, ::stride].flatten(1, 2)


class LocalConv(nn.Conv2d):
    """Depthwise convolution of the values, without bias (the projection after it has one).

    `kind="tokens"` is the published one: each head has a kernel of (9, 1), shared by its channels, along the raster
    order of all tokens; it runs across the ends of image rows. `kind="image"` has a k x k kernel for each channel, on
    the feature map; prefix tokens have no place on the map and get zero.

    Args:
        dim: channels C.
        num_heads: heads H, dividing `dim`.
        kind: `"tokens"` or `"image"`.
        kernel_size: odd k of `"image"`.
        num_prefix_tokens: tokens before those of the map.
        stride: of the output: every `stride`-th row and column of the map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kind: str = "image",
        kernel_size: int = 3,
        num_prefix_tokens: int = 0,
        stride: int = 1,
    ) -> None:
        if kind == "tokens":
            taps = _TOKEN_KERNEL_SIZE
            super().__init__(num_heads, num_heads, (taps, 1), padding=(taps // 2, 0), groups=num_heads, bias=False)
        else:
            super().__init__(dim, dim, kernel_size, stride=stride, padding=kernel_size // 2, groups=dim, bias=False)
        self.kind = kind
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.map_stride = stride

    def forward(self, v: Tensor, hw: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Convolves values (B, N, C), channels ordered by head, on a map of size `hw`; returns (B, M, C)."""
        batch, tokens, dim = v.shape
        if self.kind == "tokens":
            v_BHNK = v.reshape(batch, tokens, self.num_heads, dim // self.num_heads).transpose(1, 2)
            y = super().forward(v_BHNK).transpose(1, 2).reshape(batch, tokens, dim)
            return strided(y, hw, self.map_stride)
        prefix = self.num_prefix_tokens
        image = v[:, prefix:].reshape(batch, *hw, dim).permute(0, 3, 1, 2)
        y = super().forward(image).permute(0, 2, 3, 1).flatten(1, 2)
        return F.pad(y, (0, 0, prefix, 0)) if prefix else y


def build_local_conv(
    options: AttentionOptions, dim: int, num_heads: int, *, num_prefix_tokens: int = 0, stride: int = 1
) -> LocalConv | None:
    """The local convolution that `options` ask for. In softmax mode it starts at zero: as the plain softmax layer."""
    if options.local_conv is None:
        return None
    conv = LocalConv(
        dim,
        num_heads,
        kind=options.local_conv,
        kernel_size=options.local_conv_kernel_size,
        num_prefix_tokens=num_prefix_tokens,
        stride=stride,
    )
    if options.mode == "softmax":
        nn.init.zeros_(conv.weight)
    return conv
