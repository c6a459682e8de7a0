"""RoI align by torchvision's kernels, RoI pooling in torch, under mmcv's names and arguments.

Feature maps are (B, C, H, W), RoIs (K, 5) as batch index, x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torchvision.ops  # noqa: F401  # registers the kernels called below
from torch import Tensor

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

MAXIMUM = 0


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the average of each bin's samples to `output`, (K, C, aligned_height, aligned_width)."""
    if pool_mode == MAXIMUM:
        raise NotImplementedError(
            "roi_align with pool_mode='max' needs mmcv's compiled operators; use 'avg', the default."
        )
    work = _work_dtype(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input.to(work),
            rois.to(work),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of the feature map to `grad_input`, (B, C, H, W)."""
    work = _work_dtype(grad_output)
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad_output.to(work),
        rois.to(work),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes each bin's maximum to `output` and its place in the flattened map to `argmax`, -1 if empty.

    torchvision's own roi_pool rounds the corners to whole cells first, mmcv's does not: hence this one,
    correct and slow, a bin at a time.
    """
    _, _, height, width = input.shape
    for index, batch, rows, columns in _bins(rois, pooled_height, pooled_width, spatial_scale, height, width):
        cells = input[batch]
        for y, (top, bottom) in enumerate(rows):
            for x, (left, right) in enumerate(columns):
                if bottom <= top or right <= left:
                    output[index, :, y, x], argmax[index, :, y, x] = 0, -1
                    continue
                values, places = cells[:, top:bottom, left:right].flatten(1).max(dim=1)
                output[index, :, y, x] = values
                row, column = places // (right - left), places % (right - left)
                argmax[index, :, y, x] = ((row + top) * width + column + left).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds each bin's gradient to the cell of `grad_input`, (B, C, H, W), that was its maximum."""
    _, channels, height, width = grad_input.shape
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    cells = planes[:, :, None, None] * (height * width) + argmax
    filled = argmax >= 0
    grad_input.view(-1).index_add_(0, cells[filled], grad_output[filled].to(grad_input.dtype))


def _work_dtype(tensor: Tensor) -> torch.dtype:
    # torchvision's CPU kernels have no half precision, and its own autocast computes in float32 as well.
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _bins(
    rois: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float, height: int, width: int
) -> Iterator[tuple[int, int, list[tuple[int, int]], list[tuple[int, int]]]]:
    """For each RoI its index, its image and the half-open cell ranges of its bins' rows and columns."""
    corners = rois.float()
    starts, ends = corners[:, 1:3] * spatial_scale, (corners[:, 3:5] + 1) * spatial_scale
    valid = (ends > starts).all(dim=1, keepdim=True)

    def ranges(axis: int, bins: int, limit: int) -> list[list[tuple[int, int]]]:
        start, size = starts[:, axis, None], (ends - starts)[:, axis, None] / bins
        steps = torch.arange(bins + 1, device=rois.device)
        first = (steps[:-1] * size + start).floor().clamp(0, limit).int()
        last = (steps[1:] * size + start).ceil().clamp(0, limit).int() * valid
        return [list(zip(*pair, strict=True)) for pair in zip(first.tolist(), last.tolist(), strict=True)]

    columns, rows = ranges(0, pooled_width, width), ranges(1, pooled_height, height)
    for index, batch in enumerate(rois[:, 0].long().tolist()):
        yield index, batch, rows[index], columns[index]
