"""From candidates to a fixed number of detections an image; no shape depends on values, so one graph serves all."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

__all__ = ["Detections", "RawMaps", "clip", "keep_by_nms", "select", "top"]

RawMaps = dict[str, Tensor]
"""Outputs of a head by name, such as `cls_score_0`."""


@dataclass(frozen=True)
class Detections:
    """Boxes (B, N, 4) as x1, y1, x2, y2, scores and labels (B, N); a row of score 0 holds no detection."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def clip(boxes: Tensor, hw: Tensor) -> Tensor:
    """Boxes (B, N, 4) inside of their images, whose heights and widths are `hw` (B, 2)."""
    limits = torch.cat([hw.flip(1), hw.flip(1)], dim=1).unsqueeze(1)
    return torch.minimum(boxes.clamp(min=0), limits)


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of (B, N), or all of them where there are fewer, and their places."""
    # A symbolic minimum keeps the number of candidates free in an exported graph.
    values, places = torch.topk(scores, torch.sym_min(count, scores.shape[1]), dim=1)
    return values, places


def select(found: Detections, count: int) -> Detections:
    """The `count` best candidates, best first; rows beyond the last detection have score 0, label -1 and box 0."""
    # Rows to pad with, where there are fewer candidates than `count`.
    batch = found.scores.shape[0]
    scores = torch.cat([found.scores, found.scores.new_zeros(batch, count)], dim=1)
    boxes = torch.cat([found.boxes, found.boxes.new_zeros(batch, count, 4)], dim=1)
    labels = torch.cat([found.labels, found.labels.new_zeros(batch, count)], dim=1)
    best, places = torch.topk(scores, count, dim=1)
    real = best > 0
    boxes = torch.where(real.unsqueeze(-1), torch.gather(boxes, 1, places.unsqueeze(-1).expand(-1, -1, 4)), 0.0)
    return Detections(boxes, best, torch.where(real, torch.gather(labels, 1, places), -1))


def keep_by_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which candidates are left by non-maximum suppression within group and class, (G, K, N), bool.

    Boxes are (G, N, 4), scores of each class (G, K, N); a candidate of score 0 takes no part. The threshold is rounded
    to float32, as mmcv and ONNX round it.
    """
    kept: Tensor = torch.ops.castling_det.kept_by_nms(boxes, scores, ctypes.c_float(iou_threshold).value)
    return kept


# One operator, because ONNX has one: the number of boxes inside depends on values.
@torch.library.custom_op("castling_det::kept_by_nms", mutates_args=())
def _operator(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    classes, number = scores.shape[1:]
    flat = scores.flatten()
    (places,) = torch.where(flat > 0)
    rows = places // (classes * number) * number + places % number
    # Groups and classes are moved apart, in float64: in float32 the distance would cost the boxes digits.
    picked = boxes.flatten(0, 1)[rows].double()
    distance = (boxes.amax() - boxes.amin() + 1).double()
    offsets = (places // number).double() * distance
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[places[nms(picked + offsets.unsqueeze(-1), flat[places].double(), iou_threshold)]] = True
    return kept.view_as(scores)


@_operator.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
