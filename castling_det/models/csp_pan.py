"""PicoDet's CSP-PAN (arXiv 2111.00902): path aggregation with depthwise 5x5 convolutions, and an extra level."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmdet.models.layers import CSPLayer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.models.base import check_odd
from castling_det.registry import MODELS

__all__ = ["CSPPAN"]


@MODELS.register_module()
class CSPPAN(BaseModule):
    """Brings all maps to C channels, mixes them top-down and bottom-up, and adds a level above if one is asked for.

    The extra level (stride 64 above 8, 16, 32) is the sum of two depthwise separable convolutions of stride 2, of the
    topmost input and of the topmost output. With a fourth input of stride 64 and `num_outs=4` no level is added.

    Args:
        in_channels: channels of each of the backbone's maps, finest first, strides doubling.
        out_channels: channels C of every level, even; published: 96 (S), 128 (M), 160 (L).
        num_outs: number of levels: as many as there are maps, or one more.
        kernel_size: odd size of the depthwise kernels.
        num_csp_blocks: bottlenecks in each of the cross-stage blocks.
        norm_cfg, act_cfg, init_cfg: None is the published one: BatchNorm, hard swish, Kaiming uniform.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        out_channels: int = 96,
        num_outs: int = 4,
        kernel_size: int = 5,
        num_csp_blocks: int = 1,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        num_ins = len(in_channels)
        if num_ins < 2:
            raise ValueError(f"in_channels={tuple(in_channels)}: expected at least two maps, such as (96, 192, 384)")
        if num_outs not in (num_ins, num_ins + 1):
            raise ValueError(
                f"num_outs={num_outs}: expected the number of maps, {num_ins}, or one more; change out_indices of the "
                "backbone, or num_outs"
            )
        if out_channels < 2 or out_channels % 2:
            raise ValueError(f"out_channels={out_channels}: expected an even number, such as 96")
        check_odd("kernel_size", kernel_size)
        super().__init__(
            init_cfg=init_cfg
            or dict(type="Kaiming", layer="Conv2d", a=0, distribution="uniform", mode="fan_in", nonlinearity="relu")
        )
        style = dict(norm_cfg=norm_cfg or dict(type="BN"), act_cfg=act_cfg or dict(type="HSwish"))
        self.in_channels = tuple(in_channels)
        self.out_channels = out_channels
        self.num_outs = num_outs

        separable = partial(DepthwiseSeparableConvModule, kernel_size=kernel_size, padding=kernel_size // 2, **style)
        downsample = partial(separable, out_channels, out_channels, stride=2)

        def mixer() -> CSPLayer:
            """2 C channels to C; MMDetection's layer with depthwise bottlenecks, without identity."""
            layer = CSPLayer(2 * out_channels, out_channels, num_blocks=0, **style)
            half = out_channels // 2
            blocks = (
                nn.Sequential(ConvModule(half, half, 1, **style), separable(half, half)) for _ in range(num_csp_blocks)
            )
            layer.blocks = nn.Sequential(*blocks)
            return layer

        self.reduce = nn.ModuleList(ConvModule(channels, out_channels, 1, **style) for channels in in_channels)
        self.top_down = nn.ModuleList(mixer() for _ in range(num_ins - 1))
        self.downsamples = nn.ModuleList(downsample() for _ in range(num_ins - 1))
        self.bottom_up = nn.ModuleList(mixer() for _ in range(num_ins - 1))
        if num_outs > num_ins:
            self.extra_from_input = downsample()
            self.extra_from_output = downsample()

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, in_channels[i], H_i, W_i), finest first, to `num_outs` maps (B, C, H_i, W_i) in the same order."""
        if len(inputs) != len(self.in_channels):
            raise ValueError(
                f"inputs: expected {len(self.in_channels)} maps, one for each of in_channels={self.in_channels}, "
                f"got {len(inputs)}; change in_channels of the neck or out_indices of the backbone"
            )
        reduced = [layer(x) for layer, x in zip(self.reduce, inputs, strict=True)]
        inner = reduced[-1:]
        for mixer, lateral in zip(self.top_down, reversed(reduced[:-1]), strict=True):
            # By size, not by a factor of two: a side of 13 has 7 a level above, and twice 7 is 14.
            above = F.interpolate(inner[0], size=lateral.shape[-2:], mode="nearest")
            inner.insert(0, mixer(torch.cat([above, lateral], dim=1)))
        outputs = inner[:1]
        for downsample, mixer, lateral in zip(self.downsamples, self.bottom_up, inner[1:], strict=True):
            outputs.append(mixer(torch.cat([downsample(outputs[-1]), lateral], dim=1)))
        if self.num_outs > len(inputs):
            outputs.append(self.extra_from_input(reduced[-1]) + self.extra_from_output(outputs[-1]))
        return tuple(outputs)
