"""PicoDet's head (arXiv 2111.00902, its ESNet version): depthwise towers, varifocal loss, box distributions, SimOTA."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import DepthwiseSeparableConvModule
from mmdet.models.dense_heads import GFLHead
from mmdet.models.utils import multi_apply
from mmdet.structures.bbox import bbox_overlaps
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor, nn

from castling_det.models.base import check_odd
from castling_det.registry import MODELS

__all__ = ["PicoHead", "flattened"]


@MODELS.register_module()
class PicoHead(GFLHead):
    """A GFL head with separate towers for each level, points as priors, and labels assigned from the predictions.

    A box is four distances from its point, in strides; each is the expectation of a distribution over 0 to `reg_max`.
    Prediction is `GFLHead`'s, so the detector's `type` is `GFL`. The varifocal target of a positive's class is the IoU
    of its box; GIoU and distribution focal loss of the positives are weighted by their highest score.

    Args:
        num_classes, in_channels: classes K without the background, and channels of the maps.
        feat_channels: channels of the towers; published: 96 (S), 128 (M), 160 (L).
        stacked_convs: depthwise separable convolutions in a tower; published: 2 (S), 4 (M, L).
        kernel_size: odd size of the depthwise kernels.
        share_cls_reg: one tower, and one last convolution, for both scores and boxes, as published.
        strides: of the levels in pixels.
        cell_offset: place of the point in its cell, in strides.
        reg_max: largest distance in strides; the distributions have one bin more.
        norm_cfg, act_cfg, loss_cls, loss_dfl, loss_bbox, init_cfg: None is the published one, as written below.
        train_cfg: `assigner`, one that assigns from `scores` and `bboxes`; published: `VarifocalSimOTAAssigner`.
        test_cfg: MMDetection's of a dense head.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        feat_channels: int = 96,
        stacked_convs: int = 2,
        kernel_size: int = 5,
        share_cls_reg: bool = True,
        strides: Sequence[int] = (8, 16, 32, 64),
        cell_offset: float = 0.5,
        reg_max: int = 7,
        norm_cfg: dict[str, Any] | None = None,
        act_cfg: dict[str, Any] | None = None,
        loss_cls: dict[str, Any] | None = None,
        loss_dfl: dict[str, Any] | None = None,
        loss_bbox: dict[str, Any] | None = None,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if stacked_convs < 1:
            raise ValueError(f"stacked_convs={stacked_convs}: expected at least 1; published: 2 (S) or 4 (M, L)")
        check_odd("kernel_size", kernel_size)
        if reg_max < 1:
            raise ValueError(f"reg_max={reg_max}: expected at least 1 stride; published: 7")
        # The parent builds the layers in its constructor.
        self.kernel_size = kernel_size
        self.share_cls_reg = share_cls_reg
        self.act_cfg = act_cfg or dict(type="HSwish")
        scores_start_low = dict(type="Normal", name="gfl_cls", std=0.01, bias_prob=0.01)
        super().__init__(
            num_classes,
            in_channels,
            stacked_convs,
            feat_channels=feat_channels,
            norm_cfg=norm_cfg or dict(type="BN"),
            reg_max=reg_max,
            anchor_generator=dict(type="MlvlPointGenerator", strides=list(strides), offset=cell_offset),
            loss_cls=loss_cls or dict(type="VarifocalLoss", use_sigmoid=True, alpha=0.75, gamma=2.0, iou_weighted=True),
            loss_dfl=loss_dfl or dict(type="DistributionFocalLoss", loss_weight=0.25),
            loss_bbox=loss_bbox or dict(type="GIoULoss", loss_weight=2.0),
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            init_cfg=init_cfg or dict(type="Normal", layer="Conv2d", std=0.01, override=scores_start_low),
        )

    def _init_layers(self) -> None:
        levels = range(self.prior_generator.num_levels)
        sides = 4 * (self.reg_max + 1)
        last = self.cls_out_channels + (sides if self.share_cls_reg else 0)
        self.cls_convs = nn.ModuleList(self._tower() for _ in levels)
        self.gfl_cls = nn.ModuleList(nn.Conv2d(self.feat_channels, last, 1) for _ in levels)
        if not self.share_cls_reg:
            self.reg_convs = nn.ModuleList(self._tower() for _ in levels)
            self.gfl_reg = nn.ModuleList(nn.Conv2d(self.feat_channels, sides, 1) for _ in levels)

    def _tower(self) -> nn.Sequential:
        widths = [self.in_channels] + [self.feat_channels] * self.stacked_convs
        style: dict[str, Any] = dict(padding=self.kernel_size // 2, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        return nn.Sequential(
            *(DepthwiseSeparableConvModule(*pair, self.kernel_size, **style) for pair in pairwise(widths))
        )

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, in_channels, H, W) of each level to logits of scores and distributions, at least float32.

        Scores are (B, K, H, W), distributions (B, 4 * (reg_max + 1), H, W) for left, top, right, bottom.
        """
        if len(x) != len(self.gfl_cls):
            raise ValueError(
                f"x: expected {len(self.gfl_cls)} maps, one for each of strides, got {len(x)}; "
                "change strides of the head or num_outs of the neck"
            )
        scores, boxes = multi_apply(self.forward_single, x, range(len(x)))
        return scores, boxes

    def forward_single(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """As `forward`, for one level."""
        score: Tensor = self.gfl_cls[level](self.cls_convs[level](x))
        if self.share_cls_reg:
            score, box = score.split([self.cls_out_channels, 4 * (self.reg_max + 1)], dim=1)
        else:
            box = self.gfl_reg[level](self.reg_convs[level](x))
        dtype = torch.promote_types(score.dtype, torch.float32)
        return score.to(dtype), box.to(dtype)

    def anchor_center(self, anchors: Tensor) -> Tensor:
        """The priors are points already, (N, 2); `GFLHead`'s prediction asks for their centres."""
        return anchors

    def loss_by_feat(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[dict[str, Any]],
        batch_gt_instances_ignore: Sequence[InstanceData] | None = None,
    ) -> dict[str, Tensor]:
        """The three losses, 0-d, from the outputs of `forward` and each image's `bboxes` (G, 4) in pixels and `labels`.

        Image metas and ignored boxes are not used, as published.
        """
        logits, distributions = flattened(cls_scores), flattened(bbox_preds)
        sizes = [score.shape[-2:] for score in cls_scores]
        place = dict(dtype=distributions.dtype, device=distributions.device)
        priors = torch.cat(self.prior_generator.grid_priors(sizes, **place, with_stride=True))
        strides = priors[:, 2:3]
        # In strides, as published: the eps of the IoUs is relative to this unit.
        points = (priors[:, :2] / strides).expand(len(logits), -1, -1)
        boxes = self.bbox_coder.decode(points, self.integral(distributions).view(*logits.shape[:2], 4))
        probabilities = logits.detach().sigmoid()

        matched = self._assign(probabilities, boxes.detach() * strides, priors, batch_gt_instances)
        image, prior = matched.nonzero(as_tuple=True)
        picks = [(truth, row[row > 0] - 1) for truth, row in zip(batch_gt_instances, matched, strict=True)]
        labels = torch.cat([truth.labels[indices] for truth, indices in picks])
        targets = torch.cat([truth.bboxes[indices] for truth, indices in picks]) / strides[prior]
        picked = boxes[image, prior]

        quality = torch.zeros_like(logits)
        quality[image, prior, labels] = bbox_overlaps(picked.detach(), targets, is_aligned=True)
        # An image without a positive counts as one, as published.
        num_positives = reduce_mean((matched > 0).sum(dim=1).clamp(min=1).sum().to(logits.dtype))
        loss_cls = self.loss_cls(logits.flatten(0, 1), quality.flatten(0, 1), avg_factor=num_positives)

        weight = probabilities[image, prior].amax(dim=1)
        total_weight = reduce_mean(weight.sum()).clamp(min=1)
        distances = self.bbox_coder.encode(points[image, prior], targets, self.reg_max)
        bins = distributions[image, prior].view(-1, self.reg_max + 1)
        return {
            "loss_cls": loss_cls,
            "loss_bbox": self.loss_bbox(picked, targets, weight=weight, avg_factor=total_weight),
            "loss_dfl": self.loss_dfl(
                bins, distances.flatten(), weight=weight.repeat_interleave(4), avg_factor=4 * total_weight
            ),
        }

    @torch.no_grad()
    def _assign(self, scores: Tensor, boxes: Tensor, priors: Tensor, truths: Sequence[InstanceData]) -> Tensor:
        """(B, P): 0 for background, else one more than the index of the image's box."""
        predictions = [
            InstanceData(scores=score, bboxes=box, priors=priors) for score, box in zip(scores, boxes, strict=True)
        ]
        pairs = zip(predictions, truths, strict=True)
        return torch.stack([self.assigner.assign(found, truth).gt_inds for found, truth in pairs])


def flattened(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C, H, W) of all levels as one tensor (B, places, C), each level in raster order."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
