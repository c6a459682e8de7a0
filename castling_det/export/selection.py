"""From candidates to a fixed number of detections an image, in operators that torch.export and ONNX know.

Everything is (batch, ...) with one number of candidates for all images; nothing depends on values, so that the same
graph serves any image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

__all__ = ["NMS_OPERATOR", "Detections", "keep_by_nms", "select", "top"]

NMS_OPERATOR = "castling_det::kept_by_nms"


@dataclass(frozen=True)
class Detections:
    """Rows by descending score; rows beyond the last detection have score 0, label -1 and box 0."""

    boxes: Tensor
    """(B, N, 4), x1, y1, x2, y2."""
    scores: Tensor
    """(B, N)."""
    labels: Tensor
    """(B, N), int64."""


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of (B, N), or all of them where there are fewer, and their places."""
    # A symbolic minimum keeps the number of candidates free in an exported graph.
    values, places = torch.topk(scores, torch.sym_min(count, scores.shape[1]), dim=1)
    return values, places


def select(boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> Detections:
    """The `count` best of (B, N) candidates; a candidate of score 0 is none.

    Args:
        boxes: (B, N, 4). scores: (B, N), at least 0. labels: (B, N), int64.
        count: rows of the result.
    """
    # Rows to pad with, where there are fewer candidates than rows.
    batch = scores.shape[0]
    scores = torch.cat([scores, scores.new_zeros(batch, count)], dim=1)
    boxes = torch.cat([boxes, boxes.new_zeros(batch, count, 4)], dim=1)
    labels = torch.cat([labels, labels.new_zeros(batch, count)], dim=1)
    best, places = torch.topk(scores, count, dim=1)
    found = best > 0
    picked = torch.gather(boxes, 1, places.unsqueeze(-1).expand(-1, -1, 4))
    return Detections(
        torch.where(found.unsqueeze(-1), picked, 0.0),
        best,
        torch.where(found, torch.gather(labels, 1, places), -1),
    )


def keep_by_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, as_operator: bool) -> Tensor:
    """Whether each candidate is left by non-maximum suppression within its group and class.

    Args:
        boxes: (G, N, 4).
        scores: of each class, (G, K, N); a candidate of score 0 takes no part.
        iou_threshold: a box is dropped when its IoU with a better one that is kept is above it.
        as_operator: as the one operator that ONNX knows as NonMaxSuppression. Otherwise in torch's own, whose
            number of boxes depends on the scores.

    Returns:
        (G, K, N), bool.
    """
    if as_operator:
        kept: Tensor = torch.ops.castling_det.kept_by_nms(boxes, scores, iou_threshold)
        return kept
    return _kept_by_nms(boxes, scores, iou_threshold)


def _kept_by_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    classes, number = scores.shape[1:]
    flat = scores.flatten()
    (places,) = torch.where(flat > 0)
    rows = places // (classes * number) * number + places % number
    # Groups and classes lie side by side, in float64 because in float32 their distance would cost the boxes digits.
    picked = boxes.flatten(0, 1)[rows].double()
    distance = (boxes.amax() - boxes.amin() + 1).double()
    offsets = (places // number).double() * distance
    kept = places[nms(picked + offsets.unsqueeze(-1), flat[places].double(), iou_threshold)]
    # Not written by an index of its own: an exporter has no number of rows for it.
    return torch.zeros_like(flat, dtype=torch.int8).index_fill(0, kept, 1).bool().view_as(scores)


@torch.library.custom_op(NMS_OPERATOR, mutates_args=())
def _operator(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _kept_by_nms(boxes, scores, iou_threshold)


@_operator.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
