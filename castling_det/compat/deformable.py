"""Deformable convolutions by torchvision and deformable attention in torch, under mmcv's names and arguments.

Scratch space of the compiled operators (`columns`, `ones`, `im2col_step`) is accepted and not used.
Offsets are (B, 2 * deformable_group * kH * kW, H_out, W_out), y before x, as torchvision has them.
"""

from __future__ import annotations

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


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the convolution to `output`, (B, C_out, H_out, W_out)."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(input, weight, offset, None, None, geometry))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Adds the gradients of input and offset to `gradInput` and `gradOffset`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    of_input, _, of_offset, _, _ = _backward(gradOutput, input, weight, offset, None, None, geometry)
    gradInput += of_input
    gradOffset += of_offset


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds `scale` times the gradient of the weight to `gradWeight`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The output is linear in the weight, so its gradient does not depend on the weight's value.
    gradients = _backward(gradOutput, input, torch.zeros_like(gradWeight), offset, None, None, geometry)
    gradWeight += scale * gradients[1]


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes the convolution; `mask` (B, deformable_group * kH * kW, H_out, W_out) weights its samples."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, geometry))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Adds every gradient to its `grad_*` tensor."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    gradients = _backward(grad_output, input, weight, offset, mask, bias if with_bias else None, geometry)
    for total, gradient in zip((grad_input, grad_weight, grad_offset, grad_mask), gradients[:4], strict=True):
        total += gradient
    if with_bias:
        grad_bias += gradients[4]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention, (B, queries, heads * K), by mmcv's own torch function."""
    # Imported late: mmcv.ops is what loads this module.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    shapes = value_spatial_shapes.tolist()  # once, not one synchronisation for each level
    output: Tensor = multi_scale_deformable_attn_pytorch(value, shapes, sampling_locations, attention_weights)
    return output


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Adds the gradients of value, locations and weights to the `grad_*` tensors."""
    with torch.enable_grad():
        value, locations, weights = (
            tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)
        )
        output = ms_deform_attn_forward(
            value, value_spatial_shapes, value_level_start_index, locations, weights, im2col_step
        )
        gradients = torch.autograd.grad(output, (value, locations, weights), grad_output)
    for total, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        total += gradient


Geometry = tuple[int, int, int, int, int, int, int, int]
"""Stride, padding and dilation, each as height and width; groups; deformable groups."""


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
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
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    operands = _operands(input, weight, offset, mask, bias)
    gradients: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = torch.ops.torchvision._deform_conv2d_backward(
        grad_output.to(operands[0].dtype), *operands, *geometry, mask is not None
    )
    return gradients


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    # torchvision's CPU kernels have no half precision, and its own autocast computes in float32 as well.
    work = torch.float64 if input.dtype == torch.float64 else torch.float32
    mask = input.new_zeros(input.shape[0], 1) if mask is None else mask
    bias = input.new_zeros(weight.shape[0]) if bias is None else bias
    return tuple(tensor.to(work) for tensor in (input, weight, offset, mask, bias))
