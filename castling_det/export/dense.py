"""A dense head of MMDetection as one graph: its maps, and what `predict` makes of them, for a whole batch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead
from torch import Tensor, nn

from castling_det.export.selection import Detections, keep_by_nms, select, top

__all__ = ["Candidates", "DenseDecoder", "PostProcessing", "RawMaps", "float32_threshold"]

RawMaps = dict[str, Tensor]
"""Outputs of a head by name, such as `cls_score_0`."""


@dataclass(frozen=True)
class PostProcessing:
    """A dense head's `test_cfg`."""

    nms_pre: int
    """Candidates of each level; all where it is not positive."""
    score_thr: float
    min_bbox_size: float
    """Boxes must be wider and higher than this; negative: any are taken."""
    nms_iou: float
    max_per_img: int

    @classmethod
    def of(cls, test_cfg: Any, where: str) -> PostProcessing:
        """Reads a `test_cfg`.

        Raises:
            ValueError: another NMS than the plain one per class, or no limit of detections.
        """
        nms = dict(test_cfg.get("nms") or {})
        if nms.pop("type", "nms") != "nms" or set(nms) != {"iou_threshold"}:
            raise ValueError(
                f"{where}.nms={dict(test_cfg.get('nms') or {})}: expected dict(type='nms', iou_threshold=...)"
            )
        if test_cfg.get("max_per_img", 0) < 1:
            raise ValueError(f"{where}.max_per_img={test_cfg.get('max_per_img')}: expected a positive number")
        return cls(
            nms_pre=int(test_cfg.get("nms_pre", -1)),
            score_thr=float(test_cfg.get("score_thr", 0)),
            min_bbox_size=float(test_cfg.get("min_bbox_size", -1)),
            nms_iou=float(nms["iou_threshold"]),
            max_per_img=int(test_cfg["max_per_img"]),
        )


@dataclass(frozen=True)
class Candidates:
    """Boxes before suppression; a score of 0 is none."""

    boxes: Tensor
    """(B, N, 4), clipped to the image."""
    scores: Tensor
    """(B, N)."""
    labels: Tensor
    """(B, N), int64."""


class DenseDecoder(nn.Module):
    """The head's maps to detections, as `predict_by_feat` of GFL, PicoDet, RetinaNet, RTMDet and RPN makes them.

    Args:
        head: MMDetection's.
        settings: its `test_cfg`.
        label_is_level: suppress within a level instead of a class and label by level, as RPN does. It also takes the
            best candidates whatever their score.
        nms_as_operator: see `keep_by_nms`.
    """

    def __init__(
        self, head: nn.Module, settings: PostProcessing, *, label_is_level: bool = False, nms_as_operator: bool = True
    ) -> None:
        super().__init__()
        self.head: Any = head
        self.settings = settings
        self.label_is_level = label_is_level
        self.nms_as_operator = nms_as_operator
        if not self.head.use_sigmoid_cls:
            raise ValueError(
                f"{type(head).__name__}: expected scores by sigmoid; exporting softmax scores is not written"
            )

    def maps(self, features: Sequence[Tensor]) -> RawMaps:
        """The head's own outputs in float32, (B, C, H, W) of each level."""
        scores, boxes = self.head(features)
        named = {f"cls_score_{level}": score.float() for level, score in enumerate(scores)}
        return named | {f"bbox_pred_{level}": box.float() for level, box in enumerate(boxes)}

    def forward(self, maps: RawMaps, hw: tuple[int, int]) -> Detections:
        """Detections of images of height and width `hw` from `maps`."""
        settings = self.settings
        found = self._candidates(maps, hw)
        scores = found.scores
        groups = self.head.prior_generator.num_levels if self.label_is_level else self.head.num_classes
        # Of each class its own row; elsewhere it has score 0 and takes no part.
        if groups > 1:
            own = found.labels.unsqueeze(1) == torch.arange(groups, device=scores.device)[:, None]
            rows = torch.where(own, scores.unsqueeze(1), 0.0)
        else:
            rows = scores.unsqueeze(1)
        threshold = float32_threshold(settings.nms_iou)
        kept = keep_by_nms(found.boxes, rows, threshold, as_operator=self.nms_as_operator).any(dim=1)
        return select(found.boxes, torch.where(kept, scores, 0.0), found.labels, settings.max_per_img)

    def _candidates(self, maps: RawMaps, hw: tuple[int, int]) -> Candidates:
        generator = self.head.prior_generator
        levels = range(generator.num_levels)
        logits = [maps[f"cls_score_{level}"] for level in levels]
        sizes = [(x.shape[-2], x.shape[-1]) for x in logits]
        priors = generator.grid_priors(sizes, dtype=torch.float32, device=logits[0].device)
        parts = [self._level(level, logits[level], maps[f"bbox_pred_{level}"], priors[level]) for level in levels]
        boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        height, width = hw
        boxes = torch.stack(
            [boxes[..., side].clamp(min=0, max=limit) for side, limit in enumerate((width, height, width, height))], -1
        )
        minimum = self.settings.min_bbox_size
        if minimum >= 0:
            extent = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where((extent > minimum).all(dim=-1), scores, 0.0)
        return Candidates(boxes, scores, labels)

    def _level(self, level: int, logits: Tensor, preds: Tensor, priors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best of one level: boxes (B, N, 4) before clipping, scores and labels (B, N)."""
        classes, batch = self.head.cls_out_channels, logits.shape[0]
        scores = _rows(logits, classes).sigmoid().flatten(1)
        if not self.label_is_level:
            scores = torch.where(scores > self.settings.score_thr, scores, 0.0)
        best, places = scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        if self.settings.nms_pre > 0:
            best, places = top(scores, self.settings.nms_pre)
        rows = places // classes
        labels = torch.full_like(places, level) if self.label_is_level else places % classes
        channels = preds.shape[1] // (logits.shape[1] // classes)
        picked = torch.gather(_rows(preds, channels), 1, rows.unsqueeze(-1).expand(-1, -1, channels)).flatten(0, 1)
        boxes = self._decoded(level, priors[rows.flatten()], picked)
        return boxes.unflatten(0, (batch, -1)), best, labels

    def _decoded(self, level: int, priors: Tensor, preds: Tensor) -> Tensor:
        head = self.head
        if isinstance(head, GFLHead):
            # As `head.integral`, whose buffer the ONNX exporter mistakes for its own copy.
            bins = head.reg_max + 1
            places = torch.arange(bins, dtype=preds.dtype, device=preds.device)
            distances = (preds.reshape(-1, bins).softmax(dim=1) @ places).reshape(-1, 4) * head.prior_generator.strides[
                level
            ][0]
            priors, preds = head.anchor_center(priors), distances
        boxes: Tensor = head.bbox_coder.decode(priors, preds)
        return boxes


def float32_threshold(value: float) -> float:
    """As mmcv and ONNX compare: with a float32 threshold."""
    threshold: float = ctypes.c_float(value).value
    return threshold


def _rows(x: Tensor, channels: int) -> Tensor:
    """Maps (B, A * channels, H, W) as (B, H * W * A, channels), in the order of the priors."""
    rows: Tensor = x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, channels))
    return rows
