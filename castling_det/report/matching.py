"""Which detections of an image are right: greedy matching by score, as COCO's evaluation does it at one IoU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from castling_det.report.record import Counts

__all__ = ["Boxes", "Match", "match"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: `xyxy` (M, 4) in pixels, `labels` (M,) category ids, `scores` (M,) in [0, 1].

    `crowd` (M,) marks annotations that stand for a group: detections inside are neither right nor wrong.
    """

    xyxy: Array
    labels: NDArray[np.int64]
    scores: Array
    crowd: NDArray[np.bool_]

    def at_least(self, score: float) -> Boxes:
        """Those with a score of at least `score`."""
        keep = self.scores >= score
        return replace(
            self,
            xyxy=self.xyxy[keep],
            labels=self.labels[keep],
            scores=self.scores[keep],
            crowd=self.crowd[keep],
        )


@dataclass(frozen=True)
class Match:
    """`right` (M,) of the detections, `ignored` (M,) those inside a crowd, `found` (G,) of the annotations."""

    right: NDArray[np.bool_]
    ignored: NDArray[np.bool_]
    found: NDArray[np.bool_]
    counts: Counts


def match(detections: Boxes, truth: Boxes, *, iou: float = 0.5) -> Match:
    """Gives each detection, best score first, the free annotation of its category with the largest IoU >= `iou`."""
    right = np.zeros(len(detections.labels), dtype=bool)
    ignored = np.zeros_like(right)
    found = np.zeros(len(truth.labels), dtype=bool)
    overlap = _iou(detections.xyxy, truth.xyxy, truth.crowd)
    for index in np.argsort(-detections.scores, kind="stable"):
        same = truth.labels == detections.labels[index]
        free = np.where(same & ~truth.crowd & ~found, overlap[index], -1.0)
        if free.size and free.max() >= iou:
            found[free.argmax()] = right[index] = True
        elif np.any(overlap[index][same & truth.crowd] >= iou):
            ignored[index] = True
    counts = Counts(tp=int(right.sum()), fp=int((~right & ~ignored).sum()), fn=int((~found & ~truth.crowd).sum()))
    return Match(right, ignored, found, counts)


def _iou(detections: Array, truth: Array, crowd: NDArray[np.bool_]) -> Array:
    """Intersection over union (M, G); over a crowd, intersection over the detection's area, as COCO has it."""
    low = np.maximum(detections[:, None, :2], truth[None, :, :2])
    high = np.minimum(detections[:, None, 2:], truth[None, :, 2:])
    intersection = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=-1) for boxes in (detections, truth)]
    union = np.where(crowd[None, :], areas[0][:, None], areas[0][:, None] + areas[1][None, :] - intersection)
    return np.asarray(intersection / np.maximum(union, np.finfo(np.float64).tiny), dtype=np.float64)
