"""A dense head of MMDetection with its `predict` as one graph for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead
from torch import Tensor, nn

from castling_det.export.selection import Detections, RawMaps, clip, keep_by_nms, select, top

__all__ = ["DenseDecoder", "PostProcessing"]


@dataclass(frozen=True)
class PostProcessing:
    """A head's `test_cfg`."""

    nms_pre: int  # candidates of each level; all where it is not positive
    score_thr: float
    min_bbox_size: float  # boxes must be wider and higher; negative: any are taken
    nms_iou: float
    max_per_img: int

    @classmethod
    def of(cls, test_cfg: Any, where: str) -> PostProcessing:
        """Reads a `test_cfg`; ValueError for another NMS than the plain one per class, or no limit of detections."""
        nms = dict(test_cfg.get("nms") or {})
        if nms.pop("type", "nms") != "nms" or set(nms) != {"iou_threshold"}:
            raise ValueError(f"{where}.nms={test_cfg.get('nms')}: expected dict(type='nms', iou_threshold=...)")
        if test_cfg.get("max_per_img", 0) < 1:
            raise ValueError(f"{where}.max_per_img={test_cfg.get('max_per_img')}: expected a positive number")
        return cls(
            nms_pre=int(test_cfg.get("nms_pre", -1)),
            score_thr=float(test_cfg.get("score_thr", 0)),
            min_bbox_size=float(test_cfg.get("min_bbox_size", -1)),
            nms_iou=float(nms["iou_threshold"]),
            max_per_img=int(test_cfg["max_per_img"]),
        )


class DenseDecoder(nn.Module):
    """From features to detections, as GFL, PicoDet, RetinaNet, RTMDet and RPN predict them.

    `label_is_level` is for RPN: suppression stays within a level, and candidates of any score are taken.
    """

    def __init__(self, head: nn.Module, settings: PostProcessing, *, label_is_level: bool = False) -> None:
        super().__init__()
        self.head: Any = head
        self.settings = settings
        self.label_is_level = label_is_level
        if not self.head.use_sigmoid_cls:
            raise ValueError(f"{type(head).__name__}: expected scores by sigmoid; softmax scores are not exported")

    def forward(self, features: Sequence[Tensor], hw: Tensor) -> tuple[Detections, RawMaps]:
        """Detections of images of heights and widths `hw` (B, 2), and the head's maps (B, C, H, W) in float32."""
        logits, preds = ([level.float() for level in levels] for levels in self.head(features))
        found = self._candidates(logits, preds, hw)
        scores = found.scores
        groups = len(logits) if self.label_is_level else self.head.num_classes
        # Each class gets a row of its own, in which the other classes' candidates have score 0.
        own = found.labels.unsqueeze(1) == torch.arange(groups, device=scores.device)[:, None]
        rows = torch.where(own, scores.unsqueeze(1), 0.0)
        kept = keep_by_nms(found.boxes, rows, self.settings.nms_iou).any(dim=1)
        best = Detections(found.boxes, torch.where(kept, scores, 0.0), found.labels)
        maps = {f"cls_score_{level}": value for level, value in enumerate(logits)}
        maps |= {f"bbox_pred_{level}": value for level, value in enumerate(preds)}
        return select(best, self.settings.max_per_img), maps

    def _candidates(self, logits: list[Tensor], preds: list[Tensor], hw: Tensor) -> Detections:
        """The best of every level, before suppression."""
        sizes = [(x.shape[-2], x.shape[-1]) for x in logits]
        priors = self.head.prior_generator.grid_priors(sizes, dtype=torch.float32, device=logits[0].device)
        parts = [self._level(level, *values) for level, values in enumerate(zip(logits, preds, priors, strict=True))]
        boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        boxes = clip(boxes, hw)
        if self.settings.min_bbox_size >= 0:
            extent = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where((extent > self.settings.min_bbox_size).all(dim=-1), scores, 0.0)
        return Detections(boxes, scores, labels)

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
            # The same as `head.integral`, whose buffer the ONNX exporter confuses with a copy of its own.
            bins = torch.arange(head.reg_max + 1, dtype=preds.dtype, device=preds.device)
            distances = (preds.reshape(-1, len(bins)).softmax(dim=1) @ bins).reshape(-1, 4)
            priors, preds = head.anchor_center(priors), distances * head.prior_generator.strides[level][0]
        boxes: Tensor = head.bbox_coder.decode(priors, preds)
        return boxes


def _rows(x: Tensor, channels: int) -> Tensor:
    """Maps (B, A * channels, H, W) as (B, H * W * A, channels), in the order of the priors."""
    rows: Tensor = x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, channels))
    return rows
