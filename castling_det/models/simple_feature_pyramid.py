"""ViTDet's simple feature pyramid (arXiv 2203.16527): every level from the last map of a plain backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.registry import MODELS

__all__ = ["SimpleFeaturePyramid"]

# For `norm_cfg=dict(type="castling_det.LayerNorm2d")` in mmdet's heads, as ViTDet has them.
MODELS.register_module(module=LayerNorm2d)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Up-samples one map by transposed convolutions, down-samples it by pooling; then 1x1, 3x3, each with LayerNorm.

    Strides beyond twice the input's subsample the level before them (ViTDet's P6), without parameters.

    Args:
        in_channels, in_stride: channels of the backbone's map, and its stride in pixels.
        out_channels, out_strides: channels of every level, and their strides, `in_stride` times powers of two.
        in_index: which of the backbone's maps is read.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int = 256,
        in_stride: int = 16,
        out_strides: Sequence[int] = (4, 8, 16, 32),
        in_index: int = -1,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        _check_strides(in_stride, out_strides)
        self.in_index = in_index
        self.out_strides = tuple(out_strides)
        self.levels = nn.ModuleList(
            _level(in_channels, out_channels, in_stride, stride) for stride in out_strides if stride <= 2 * in_stride
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps the map `in_index`, (B, in_channels, H, W), to one (B, out_channels, H', W') for each out stride."""
        outputs = [level(inputs[self.in_index]) for level in self.levels]
        while len(outputs) < len(self.out_strides):
            outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return tuple(outputs)


def _level(in_channels: int, out_channels: int, in_stride: int, out_stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = in_channels
    if out_stride > in_stride:
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
    for step in range(round(math.log2(in_stride / out_stride))):
        if step:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        channels //= 2
    layers += [
        nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]
    return nn.Sequential(*layers)


def _check_strides(in_stride: int, out_strides: Sequence[int]) -> None:
    ratios = [stride / in_stride for stride in out_strides]
    powers = all(ratio > 0 and math.log2(ratio).is_integer() for ratio in ratios)
    doubling_tail = all(later == 2 * earlier for earlier, later in pairwise(out_strides) if later > 2 * in_stride)
    if not ratios or not powers or list(out_strides) != sorted(set(out_strides)) or not doubling_tail or ratios[0] > 2:
        raise ValueError(
            f"out_strides={tuple(out_strides)}: expected ascending in_stride={in_stride} times powers of two, "
            f"doubling from {2 * in_stride} on, such as {(in_stride // 4, in_stride // 2, in_stride, 2 * in_stride)}"
        )
