"""The box branch of Faster and Mask R-CNN as one graph; masks are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision.ops  # noqa: F401  # registers the kernel called below
from torch import Tensor, nn

from castling_det.export.dense import DenseDecoder, PostProcessing, RawMaps, float32_threshold
from castling_det.export.selection import Detections, keep_by_nms, select

__all__ = ["TwoStageDecoder"]


class TwoStageDecoder(nn.Module):
    """Proposals of the RPN, boxes and classes of the RoI head, as MMDetection's two-stage detectors predict them.

    Args:
        detector: MMDetection's.
        nms_as_operator: see `keep_by_nms`.
    """

    def __init__(self, detector: Any, *, nms_as_operator: bool = True) -> None:
        super().__init__()
        rpn_settings = PostProcessing.of(detector.rpn_head.test_cfg, "test_cfg.rpn")
        self.proposals = DenseDecoder(
            detector.rpn_head, rpn_settings, label_is_level=True, nms_as_operator=nms_as_operator
        )
        self.bbox_head = detector.roi_head.bbox_head
        self.settings = PostProcessing.of(detector.roi_head.test_cfg, "test_cfg.rcnn")
        self.nms_as_operator = nms_as_operator
        self.extractor = detector.roi_head.bbox_roi_extractor
        if self.bbox_head.custom_activation or len({layer.sampling_ratio for layer in self.extractor.roi_layers}) != 1:
            raise ValueError("roi_head: expected MMDetection's plain bbox_head and single-level RoI extractor")

    def maps(self, features: Sequence[Tensor], hw: tuple[int, int]) -> RawMaps:
        """The RPN's maps, proposals (B, P, 4) with their scores, and for each proposal the RoI head's outputs.

        `cls_score` is (B, P, K + 1), logits with the background last; `bbox_pred` (B, P, 4 K) or (B, P, 4).
        """
        rpn = self.proposals.maps(features)
        found = self.proposals(rpn, hw)
        batch, count = found.scores.shape
        image = torch.arange(batch, device=found.boxes.device, dtype=found.boxes.dtype)
        image = image[:, None, None].expand(-1, count, 1)
        rois = torch.cat([image, found.boxes], dim=-1).flatten(0, 1)
        scores, boxes = self.bbox_head(self._pooled(features, rois))
        return {
            **{f"rpn_{name}": value for name, value in rpn.items()},
            "proposals": found.boxes,
            "proposal_scores": found.scores,
            "cls_score": scores.float().unflatten(0, (batch, count)),
            "bbox_pred": boxes.float().unflatten(0, (batch, count)),
        }

    def forward(self, maps: RawMaps, hw: tuple[int, int]) -> Detections:
        """Detections of images of height and width `hw` from `maps`."""
        proposals, settings = maps["proposals"], self.settings
        batch, count = proposals.shape[:2]
        classes = self.bbox_head.num_classes
        scores = maps["cls_score"].softmax(dim=-1)[..., :-1]
        real = (maps["proposal_scores"] > 0).unsqueeze(-1) & (scores > settings.score_thr)
        scores = torch.where(real, scores, 0.0)
        columns = 1 if self.bbox_head.reg_class_agnostic else classes
        rows = proposals.unsqueeze(2).expand(-1, -1, columns, -1).reshape(-1, 4)
        boxes = self.bbox_head.bbox_coder.decode(rows, maps["bbox_pred"].reshape(-1, 4))
        height, width = hw
        boxes = torch.stack(
            [boxes[..., side].clamp(min=0, max=limit) for side, limit in enumerate((width, height, width, height))], -1
        )
        boxes = boxes.view(batch, count, columns, 4).expand(-1, -1, classes, -1)
        # Each class has boxes of its own, so that each is a group of its own.
        grouped = boxes.transpose(1, 2).flatten(0, 1)
        of_class = scores.transpose(1, 2)
        threshold = float32_threshold(settings.nms_iou)
        kept = keep_by_nms(
            grouped, of_class.flatten(0, 1).unsqueeze(1), threshold, as_operator=self.nms_as_operator
        ).view(batch, classes, count)
        labels = torch.arange(classes, device=scores.device)[None, :, None].expand(batch, -1, count)
        return select(
            grouped.reshape(batch, classes * count, 4),
            torch.where(kept, of_class, 0.0).flatten(1),
            labels.flatten(1),
            settings.max_per_img,
        )

    def _pooled(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Each RoI from the level of its size, (B * P, C, h, w)."""
        layers: Sequence[Any] = self.extractor.roi_layers
        levels = self.extractor.map_roi_levels(rois, len(layers))
        pooled: list[Tensor] = []
        for level, layer in enumerate(layers):
            # On the other levels a RoI is empty, which costs nothing and gives zeros: no number of RoIs depends on
            # values, and the sum is the one level's.
            own = torch.where((levels == level).unsqueeze(-1), rois[:, 1:], 0.0)
            pooled.append(
                torch.ops.torchvision.roi_align(
                    features[level].float(),
                    torch.cat([rois[:, :1], own], dim=1),
                    layer.spatial_scale,
                    *layer.output_size,
                    layer.sampling_ratio,
                    layer.aligned,
                )
            )
        total = torch.stack(pooled).sum(dim=0)
        return total.to(features[0].dtype)
