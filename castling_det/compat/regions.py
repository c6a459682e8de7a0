"""RoI align by torchvision's kernels, RoI pooling in torch, under MMCV's names and arguments.

Feature maps are (B, C, H, W), RoIs (K, 5) as batch index, x1, y1, x2, y2.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision.ops  # noqa: F401  # registers the kernels called below
from torch import Tensor

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

MAXIMUM = 0


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **sizes: Any
) -> None:
    """Writes the average of each bin's samples to `output`, (K, C, aligned_height, aligned_width)."""
    if sizes["pool_mode"] == MAXIMUM:
        raise NotImplementedError(
            "roi_align with pool_mode='max' needs mmcv's compiled operators; use 'avg', the default."
        )
    work = _work_dtype(input)
    names = ("spatial_scale", "aligned_height", "aligned_width", "sampling_ratio", "aligned")
    numbers = [sizes[name] for name in names]
    output.copy_(torch.ops.torchvision.roi_align(input.to(work), rois.to(work), *numbers))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **sizes: Any
) -> None:
    """Adds the gradient of the feature map to `grad_input`, (B, C, H, W)."""
    work = _work_dtype(grad_output)
    scale, height, width = (sizes[name] for name in ("spatial_scale", "aligned_height", "aligned_width"))
    numbers = (scale, height, width, *grad_input.shape, sizes["sampling_ratio"], sizes["aligned"])
    grad_input += torch.ops.torchvision._roi_align_backward(grad_output.to(work), rois.to(work), *numbers)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes each bin's maximum to `output` and its place in the flattened map to `argmax`, -1 if the bin is empty.

    torchvision's roi_pool rounds the corners to whole cells first and MMCV's does not, so this one is written out.
    """
    height, width = input.shape[-2:]
    for index, roi in enumerate(rois.float()):
        start, end = roi[1:3] * spatial_scale, (roi[3:5] + 1) * spatial_scale
        valid = bool((end > start).all())
        columns = _bins(start[0], end[0], pooled_width, width) & valid
        rows = _bins(start[1], end[1], pooled_height, height) & valid
        # One axis after the other: (C, 1, H, W) -> (C, bins, H) -> (C, bins, bins).
        cells = input[int(roi[0])][:, None]
        by_column, column = cells.masked_fill(~columns[:, None], -torch.inf).max(dim=-1)
        best, row = by_column[:, None].masked_fill(~rows[:, None], -torch.inf).max(dim=-1)
        place = row * width + column.gather(2, row.transpose(1, 2)).transpose(1, 2)
        empty = ~(rows.any(dim=1)[:, None] & columns.any(dim=1))
        output[index], argmax[index] = best.masked_fill(empty, 0), place.masked_fill(empty, -1).to(argmax.dtype)


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, **sizes: float) -> None:
    """Adds each bin's gradient to the cell of `grad_input`, (B, C, H, W), that was its maximum."""
    _, channels, height, width = grad_input.shape
    planes = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    cells = planes[:, :, None, None] * (height * width) + argmax
    filled = argmax >= 0
    grad_input.view(-1).index_add_(0, cells[filled], grad_output[filled].to(grad_input.dtype))


def _bins(start: Tensor, end: Tensor, bins: int, limit: int) -> Tensor:
    """Which cells of an axis each bin covers: (bins, limit), bool."""
    size, steps, cells = (end - start) / bins, torch.arange(bins + 1, device=start.device), torch.arange(limit)
    first, last = (steps[:-1] * size + start).floor(), (steps[1:] * size + start).ceil()
    cells = cells.to(start.device)
    return (cells >= first[:, None]) & (cells < last[:, None])


def _work_dtype(tensor: Tensor) -> torch.dtype:
    # torchvision's CPU kernels have no half precision, and its own autocast computes in float32 as well.
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
