"""SimOTA with PicoDet's cost: the losses that the head trains with."""

from __future__ import annotations

import torch
from mmdet.models.task_modules.assigners import AssignResult, SimOTAAssigner
from mmdet.models.task_modules.assigners.sim_ota_assigner import INF
from mmengine.structures import InstanceData
from torch import Tensor

from castling_det.registry import TASK_UTILS

__all__ = ["VarifocalSimOTAAssigner", "varifocal_costs"]

_LOWEST_LOG = -100.0  # torch's binary cross entropy clamps at it, too


@TASK_UTILS.register_module()
class VarifocalSimOTAAssigner(SimOTAAssigner):
    """MMDetection's SimOTA (candidates, dynamic k, conflicts) with the cost varifocal loss + weight * GIoU loss.

    Args:
        center_radius: candidates lie within this many strides of a box's centre, or in a box; those where both is true
            are preferred.
        candidate_topk: a box gets as many priors as the IoUs of its best `candidate_topk` sum up to, at least one.
        iou_weight: weight of the GIoU loss; published 6. cls_weight: weight of the varifocal loss.
        alpha: weight of the varifocal loss's negatives. gamma: exponent of their focal weight.
    """

    def __init__(
        self,
        *,
        center_radius: float = 2.5,
        candidate_topk: int = 10,
        iou_weight: float = 6.0,
        cls_weight: float = 1.0,
        alpha: float = 0.75,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(center_radius, candidate_topk, iou_weight, cls_weight)
        self.alpha = alpha
        self.gamma = gamma

    def assign(
        self, pred_instances: InstanceData, gt_instances: InstanceData, gt_instances_ignore: InstanceData | None = None
    ) -> AssignResult:
        """Picks the priors of each box of an image; `gt_instances_ignore` is not used, as published.

        Args:
            pred_instances: `priors` (P, 4), centre and stride in pixels, `bboxes` (P, 4) and `scores` (P, K) in [0, 1].
            gt_instances: `bboxes` (G, 4) and `labels` (G,).
        """
        boxes, priors = pred_instances.bboxes, pred_instances.priors
        truth, classes = gt_instances.bboxes, gt_instances.labels
        assigned = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        labels = torch.full_like(assigned, -1)
        overlaps = boxes.new_zeros(len(boxes))
        if len(truth):
            candidates, central = self.get_in_gt_and_in_center_info(priors, truth)
            if candidates.any():
                ious = self.iou_calculator(boxes[candidates], truth)
                gious = self.iou_calculator(boxes[candidates], truth, mode="giou")
                scores = pred_instances.scores[candidates].to(ious.dtype)
                costs = self.cls_weight * varifocal_costs(scores, classes, ious, alpha=self.alpha, gamma=self.gamma)
                costs = costs + self.iou_weight * (1 - gious) + INF * ~central
                # Clears in `candidates` those without a match.
                matched_ious, matched = self.dynamic_k_matching(costs, ious, len(truth), candidates)
                assigned[candidates] = matched + 1
                labels[candidates] = classes[matched]
                overlaps[candidates] = matched_ious.to(overlaps.dtype)
        return AssignResult(len(truth), assigned, overlaps, labels=labels)


def varifocal_costs(scores: Tensor, labels: Tensor, ious: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Varifocal loss, summed over classes, of every prior if it were matched with every box.

    Maps probabilities (P, K), classes of the boxes (G,) and IoUs (P, G) to (P, G), without a tensor of (P, G, K). The
    target is the IoU at the box's class and zero elsewhere; with an IoU of zero that class is a negative too.
    """
    log_p, log_not_p = scores.log().clamp(min=_LOWEST_LOG), torch.log1p(-scores).clamp(min=_LOWEST_LOG)
    negative = -alpha * scores.pow(gamma) * log_not_p
    positive = -ious * (ious * log_p[:, labels] + (1 - ious) * log_not_p[:, labels])
    others = negative.sum(dim=1, keepdim=True) - negative[:, labels]
    return others + torch.where(ious > 0, positive, negative[:, labels])
