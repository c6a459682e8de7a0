"""The box branch of Faster and Mask R-CNN as one graph; masks are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision.ops  # noqa: F401  # registers the kernel called below
from torch import Tensor, nn

from castling_det.export.dense import DenseDecoder, PostProcessing
from castling_det.export.selection import Detections, RawMaps, clip, keep_by_nms, select

__all__ = ["TwoStageDecoder"]


class TwoStageDecoder(nn.Module):
    """Proposals of the RPN, then boxes and classes of the RoI head, as MMDetection's two-stage detectors predict."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        rpn_settings = PostProcessing.of(detector.rpn_head.test_cfg, "test_cfg.rpn")
        self.proposals = DenseDecoder(detector.rpn_head, rpn_settings, label_is_level=True)
        self.bbox_head = detector.roi_head.bbox_head
        self.settings = PostProcessing.of(detector.roi_head.test_cfg, "test_cfg.rcnn")
        self.extractor = detector.roi_head.bbox_roi_extractor
        if self.bbox_head.custom_activation or len({layer.sampling_ratio for layer in self.extractor.roi_layers}) != 1:
            raise ValueError("roi_head: expected MMDetection's plain bbox_head and single-level RoI extractor")

    def forward(self, features: Sequence[Tensor], hw: Tensor) -> tuple[Detections, RawMaps]:
        """Detections of images of heights and widths `hw` (B, 2), and the maps of both heads.

        `cls_score` (B, P, K + 1) are logits with the background last, `bbox_pred` is (B, P, 4 K) or (B, P, 4).
        """
        found, rpn = self.proposals(features, hw)
        batch, count = found.scores.shape
        image = torch.arange(batch, device=found.boxes.device, dtype=found.boxes.dtype)
        rois = torch.cat([image[:, None, None].expand(-1, count, 1), found.boxes], dim=-1).flatten(0, 1)
        scores, boxes = (x.float().unflatten(0, (batch, count)) for x in self.bbox_head(self._pooled(features, rois)))
        maps = {f"rpn_{name}": value for name, value in rpn.items()}
        maps |= {"proposals": found.boxes, "proposal_scores": found.scores, "cls_score": scores, "bbox_pred": boxes}
        return self._detections(found, scores, boxes, hw), maps

    def _detections(self, proposals: Detections, logits: Tensor, deltas: Tensor, hw: Tensor) -> Detections:
        settings, classes = self.settings, self.bbox_head.num_classes
        batch, count = proposals.scores.shape
        scores = logits.softmax(dim=-1)[..., :-1]
        real = (proposals.scores > 0).unsqueeze(-1) & (scores > settings.score_thr)
        of_class = torch.where(real, scores, 0.0).transpose(1, 2)
        columns = 1 if self.bbox_head.reg_class_agnostic else classes
        rows = proposals.boxes.unsqueeze(2).expand(-1, -1, columns, -1).reshape(-1, 4)
        boxes = self.bbox_head.bbox_coder.decode(rows, deltas.reshape(-1, 4))
        boxes = clip(boxes.view(batch, count * columns, 4), hw)
        boxes = boxes.view(batch, count, columns, 4).expand(-1, -1, classes, -1).transpose(1, 2)
        # Each class has boxes of its own, so that each is a group of its own.
        kept = keep_by_nms(boxes.flatten(0, 1), of_class.flatten(0, 1).unsqueeze(1), settings.nms_iou)
        labels = torch.arange(classes, device=scores.device)[None, :, None].expand(batch, -1, count)
        best = torch.where(kept.view(batch, classes, count), of_class, 0.0)
        candidates = Detections(boxes.reshape(batch, classes * count, 4), best.flatten(1), labels.flatten(1))
        return select(candidates, settings.max_per_img)

    def _pooled(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Each RoI from the level of its size, (B * P, C, h, w)."""
        layers: Sequence[Any] = self.extractor.roi_layers
        levels = self.extractor.map_roi_levels(rois, len(layers))
        pooled: list[Tensor] = []
        for level, layer in enumerate(layers):
            # Run all RoIs on every level and zero the foreign ones: shapes stay static, and the sum picks the right
            # level. An empty RoI costs nothing and gives zeros.
            own = torch.where((levels == level).unsqueeze(-1), rois[:, 1:], 0.0)
            boxes = torch.cat([rois[:, :1], own], dim=1)
            options = (layer.spatial_scale, *layer.output_size, layer.sampling_ratio, layer.aligned)
            pooled.append(torch.ops.torchvision.roi_align(features[level].float(), boxes, *options))
        return torch.stack(pooled).sum(dim=0).to(features[0].dtype)
