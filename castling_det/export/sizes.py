"""Convolutions whose output size a tracer can divide."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

__all__ = ["keep_sizes_simple"]


class _DividingConv(nn.Module):
    """A strided convolution of kernel k, stride s and padding p on a side n that s divides: n / s places.

    The usual size, floor((n + 2 p - k) / s) + 1, is the same number, but a tracer of unknown n keeps the floor, and a
    floor of that in the next layer: its formulas grow until comparing two sizes takes minutes. Padding the far side by
    k - s - p, which may be a crop, leaves out what no place reads, and the formula is n / s.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv, sizes = self.conv, x.shape[-2:]
        strides, paddings, kernels = conv.stride, conv.padding, conv.kernel_size
        unknown = any(isinstance(n, torch.SymInt) for n in sizes)
        if not unknown or not all(statically_known_true(n % s == 0) for n, s in zip(sizes, strides, strict=True)):
            out: Tensor = conv(x)
            return out
        assert not isinstance(paddings, str)
        pads: list[int] = []
        for s, p, k in zip(reversed(strides), reversed(paddings), reversed(kernels), strict=True):
            pads += [p, k - s - p]
        return F.conv2d(F.pad(x, pads), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def keep_sizes_simple(module: nn.Module) -> None:
    """Puts a `_DividingConv` in the place of every plain strided convolution inside `module`; it computes the same."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and _divides(child) and not isinstance(parent, _DividingConv):
                setattr(parent, name, _DividingConv(child))


def _divides(conv: nn.Conv2d) -> bool:
    plain = conv.padding_mode == "zeros" and isinstance(conv.padding, tuple) and tuple(conv.dilation) == (1, 1)
    return plain and max(conv.stride) > 1
