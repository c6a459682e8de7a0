"""Deformable convolutions by torchvision's kernels and deformable attention in torch, under MMCV's names and arguments.

Offsets are (B, 2 * deformable_group * kH * kW, H_out, W_out), y before x, as torchvision has them. MMCV passes its
scratch space (`columns`, `ones`) and `im2col_step` too; they are accepted and unused. It passes sizes as keywords.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision.ops  # noqa: F401  # registers the kernels called below
from torch import Tensor

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
]

_PLAIN = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
_MODULATED = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")
_OUTSIDE = -1e4
"""An offset that leads outside of every feature map, where samples are zero."""


def deform_conv_forward(*tensors: Tensor, **sizes: int) -> None:
    """Takes input, weight, offset, output, columns, ones. Writes output, (B, C_out, H_out, W_out)."""
    input, weight, offset, output, *_ = tensors
    output.copy_(_forward(input, weight, offset, None, None, _geometry(sizes, _PLAIN)))


def deform_conv_backward_input(*tensors: Tensor, **sizes: int) -> None:
    """Takes input, offset, grad_output, grad_input, grad_offset, weight, columns. Adds to the gradients."""
    input, offset, grad_output, grad_input, grad_offset, weight, _ = tensors
    gradients = _backward(grad_output, input, weight, offset, None, None, _geometry(sizes, _PLAIN))
    grad_input += gradients[0]
    grad_offset += gradients[2]


def deform_conv_backward_parameters(*tensors: Tensor, scale: float, **sizes: int) -> None:
    """Takes input, offset, grad_output, grad_weight, columns, ones. Adds `scale` times the gradient to grad_weight."""
    input, offset, grad_output, grad_weight, *_ = tensors
    # The output is linear in the weight, so its gradient does not depend on the weight's value.
    zeros = torch.zeros_like(grad_weight)
    grad_weight += scale * _backward(grad_output, input, zeros, offset, None, None, _geometry(sizes, _PLAIN))[1]


def modulated_deform_conv_forward(*tensors: Tensor, with_bias: bool, **sizes: int) -> None:
    """Takes input, weight, bias, ones, offset, mask, output, columns. Writes the convolution to output.

    The mask, (B, deformable_group * kH * kW, H_out, W_out), weights its samples.
    """
    input, weight, bias, _, offset, mask, output, _ = tensors
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, _geometry(sizes, _MODULATED)))


def modulated_deform_conv_backward(*tensors: Tensor, with_bias: bool, **sizes: int) -> None:
    """Takes input, weight, bias, ones, offset, mask, columns, the gradients of five of them, and that of the output.

    The five are those of input, weight, bias, offset and mask; each is added to.
    """
    input, weight, bias, _, offset, mask, _, of_input, of_weight, of_bias, of_offset, of_mask, grad_output = tensors
    geometry = _geometry(sizes, _MODULATED)
    gradients = _backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    totals = [of_input, of_weight, of_offset, of_mask, *([of_bias] if with_bias else [])]
    for total, gradient in zip(totals, gradients, strict=False):
        total += gradient


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, level_starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Multi-scale deformable attention, (B, queries, heads * K), by MMCV's own torch function."""
    # Imported late: mmcv.ops is what loads this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    # A list once, not one synchronisation for each level.
    output: Tensor = multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)
    return output


def ms_deform_attn_backward(*tensors: Tensor, im2col_step: int) -> None:
    """Takes forward's tensors, grad_output, and the gradients of value, locations and weights, which it adds to."""
    value, shapes, level_starts, locations, weights, grad_output, *totals = tensors
    with torch.enable_grad():
        leaves = tuple(tensor.detach().requires_grad_() for tensor in (value, locations, weights))
        output = ms_deform_attn_forward(leaves[0], shapes, level_starts, leaves[1], leaves[2], im2col_step)
        gradients = torch.autograd.grad(output, leaves, grad_output)
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient


def _geometry(sizes: dict[str, int], names: tuple[str, ...]) -> tuple[int, ...]:
    """Stride, padding and dilation, each as height and width; groups; deformable groups."""
    return tuple(sizes[name] for name in names)


def _forward(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> Tensor:
    operands = _operands(input, weight, offset, mask, bias)
    output: Tensor = torch.ops.torchvision.deform_conv2d(*operands, *geometry, mask is not None)
    return output


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> list[Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    operands = _operands(input, weight, offset, mask, bias)
    gradients: list[Any] = list(
        torch.ops.torchvision._deform_conv2d_backward(
            grad_output.to(operands[0].dtype), *operands, *geometry, mask is not None
        )
    )
    gradients[2] = gradients[2].masked_fill(_samples_outside(input, weight, operands[2], geometry), 0)
    return gradients


def _samples_outside(input: Tensor, weight: Tensor, offset: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """Which offsets (their shape) lead to samples at or beyond -1 or the far side: (B, 2 * groups * taps, H, W).

    Such a sample is zero and MMCV gives it no gradient; torchvision gives one to a sample at exactly -1, which is
    where a padded convolution with zero offsets, such as a new one, has its first samples.
    """
    (height, width), (kernel_h, kernel_w) = input.shape[-2:], weight.shape[-2:]
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = geometry[:6]
    rows, columns = (torch.arange(side, device=offset.device) for side in offset.shape[-2:])
    tap_rows, tap_columns = (torch.arange(side, device=offset.device) for side in (kernel_h, kernel_w))
    y = (tap_rows * dilation_h - pad_h)[:, None, None, None] + (rows * stride_h)[:, None]
    x = (tap_columns * dilation_w - pad_w)[:, None, None] + columns * stride_w
    y_x = offset.unflatten(1, (-1, kernel_h, kernel_w, 2))
    y, x = y + y_x[:, :, :, :, 0], x + y_x[:, :, :, :, 1]
    outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
    mask: Tensor = outside.unsqueeze(4).expand_as(y_x).flatten(1, 4)
    return mask


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    # torchvision's CPU kernels have no half precision, and its own autocast computes in float32 as well.
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = input.new_zeros(weight.shape[0]) if bias is None else bias
    # A NaN becomes an index in the kernel and ends the process: such a sample is zero, as one far outside.
    offset = offset.nan_to_num(_OUTSIDE, posinf=-_OUTSIDE, neginf=_OUTSIDE)
    return tuple(tensor.to(work) for tensor in (input, weight, offset, mask, bias))
