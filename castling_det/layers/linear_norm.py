"""Linear layers and convolutions with BatchNorm, which fold into one layer for deployment."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["ConvNorm", "LinearNorm", "folded"]

_LayerT = TypeVar("_LayerT", nn.Linear, nn.Conv2d)


class LinearNorm(nn.Module):
    """Linear layer without bias, then BatchNorm over all tokens of the batch.

    Args:
        in_features: channels of the input. out_features: channels of the output.
        bn_weight_init: initial weight of the norm; 0 makes a residual branch start as nothing.
    """

    def __init__(self, in_features: int, out_features: int, *, bn_weight_init: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.bn = nn.BatchNorm1d(out_features)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, N, in_features) to (B, N, out_features)."""
        x = self.linear(x)
        out: Tensor = self.bn(x.flatten(0, -2)).reshape(x.shape)
        return out

    def fused(self) -> nn.Linear:
        """The one layer, with bias, that computes the same in eval mode."""
        return folded(self.linear, self.bn)


class ConvNorm(nn.Module):
    """3x3 convolution of stride 2 without bias, then BatchNorm; (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2)).

    Args:
        in_channels: channels of the input. out_channels: channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map."""
        out: Tensor = self.bn(self.linear(x))
        return out

    def fused(self) -> nn.Conv2d:
        """The one layer, with bias, that computes the same in eval mode."""
        return folded(self.linear, self.bn)


def folded(layer: _LayerT, bn: nn.BatchNorm1d | nn.BatchNorm2d) -> _LayerT:
    """A new layer, with bias, that computes what `layer` and then `bn` compute in eval mode."""
    assert bn.running_mean is not None and bn.running_var is not None
    with torch.no_grad():
        scale = (
            (bn.running_var + bn.eps).rsqrt() if bn.weight is None else bn.weight / torch.sqrt(bn.running_var + bn.eps)
        )
        weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        bias = (-bn.running_mean if layer.bias is None else layer.bias - bn.running_mean) * scale
        if bn.bias is not None:
            bias = bias + bn.bias
    fused = copy.deepcopy(layer)
    fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
    return fused
