"""Non-maximum suppression under the names and arguments of mmcv's compiled operators."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

__all__ = ["nms", "softnms"]

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the kept boxes by descending score, int64 (K,).

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box is dropped when its IoU with a kept one is above this.
        offset: 0, or 1 where a box's width is x2 - x1 + 1.
    """
    # torchvision's CPU kernel has no half precision, and none of its kernels mixes types.
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    corners = boxes.to(dtype)
    if offset:
        corners = corners + corners.new_tensor([0, 0, offset, offset])
    # mmcv compares with a float32 threshold: against a double, an IoU of float32(0.6) would be above 0.6.
    kept: Tensor = torchvision_nms(corners, scores.to(dtype), ctypes.c_float(iou_threshold).value)
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Indices of the kept boxes in the order they were picked, int64 (K,); boxes and new scores go to `dets`.

    Args:
        boxes: (N, 4) on the CPU; `scores` (N,).
        dets: (N, 5), its first K rows are written.
        iou_threshold: from this IoU on, the naive method makes a score 0, the linear one score * (1 - IoU).
        sigma: width of the Gaussian method, which multiplies by exp(-IoU^2 / sigma).
        min_score: a box is dropped when its score has decayed below this.
        method: 0 naive, 1 linear, 2 Gaussian.
        offset: 0, or 1 where a box's width is x2 - x1 + 1.

    Boxes of equal score may come in another order than from the compiled operator.
    """
    boxes, scores = boxes.float(), scores.float().clone()
    iou_threshold = ctypes.c_float(iou_threshold).value
    remaining = torch.arange(len(boxes))
    kept: list[Tensor] = []
    while len(remaining):
        best = scores[remaining].argmax()
        index = remaining[best]
        dets[len(kept), :4], dets[len(kept), 4] = boxes[index], scores[index]
        kept.append(index)
        remaining = torch.cat([remaining[:best], remaining[best + 1 :]])
        iou = _iou(boxes[index], boxes[remaining], offset)
        scores[remaining] *= _decay(iou, iou_threshold, sigma, method)
        remaining = remaining[scores[remaining] >= min_score]
    return torch.stack(kept) if kept else remaining


def _iou(box: Tensor, others: Tensor, offset: int) -> Tensor:
    def area(corners: Tensor) -> Tensor:
        return (corners[..., 2] - corners[..., 0] + offset) * (corners[..., 3] - corners[..., 1] + offset)

    extent = torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2]) + offset
    intersection = extent.clamp_min(0).prod(dim=1)
    # Two empty boxes in one place have no overlap, rather than one of 0 / 0.
    return (intersection / (area(box) + area(others) - intersection)).nan_to_num(0.0)


def _decay(iou: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == GAUSSIAN:
        return torch.exp(-(iou * iou) / sigma)
    weight = 1 - iou if method == LINEAR else torch.zeros_like(iou)
    return torch.where(iou >= iou_threshold, weight, torch.ones_like(iou))
