"""A single-stage detector that learns from its own frozen softmax version beside the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.models.pico_head import flattened
from castling_det.registry import MODELS, WEIGHT_INITIALIZERS

__all__ = ["DistilledSingleStage", "box_loss", "feature_loss", "score_loss"]

_DEFAULT_WEIGHTS = {"features": 1.0, "scores": 1.0, "boxes": 1.0}


@MODELS.register_module()
class DistilledSingleStage(SingleStageDetector):
    """MMDetection's `SingleStageDetector` (GFL, RetinaNet and RTMDet are subclasses that add nothing) with a teacher.

    The teacher has the same parts with `attention="softmax"`. It is no submodule: parameters, EMA and checkpoints hold
    the student alone, under the plain names. `tools/convert.py` makes a plain `SingleStageDetector` of the student.

    Args:
        distillation: `checkpoint`, a file of the softmax training, and the weights of the losses `features` (maps of
            the neck), `scores` and `boxes` (outputs of the head), each 1 by default; 0 leaves a loss out. A missing or
            unfit checkpoint is a ValueError with the first batch.
        detector: the arguments of `SingleStageDetector`.
    """

    def __init__(self, *, distillation: dict[str, Any], **detector: Any) -> None:
        # Copied first: MMDetection writes into the config of the head.
        teacher = copy.deepcopy(detector)
        super().__init__(**detector)
        weights = {**_DEFAULT_WEIGHTS, **distillation}
        self._checkpoint = str(weights.pop("checkpoint", ""))
        if set(weights) != set(_DEFAULT_WEIGHTS) or not all(weight >= 0 for weight in weights.values()):
            raise ValueError(
                f"distillation={distillation}: expected checkpoint and weights >= 0 of {', '.join(_DEFAULT_WEIGHTS)}"
            )
        backbone = teacher["backbone"]
        if "attention" not in backbone:
            raise ValueError("distillation: model.backbone has no `attention`, so there is no softmax version of it")
        backbone.update(attention="softmax", init_cfg=None)
        (backbone.get("attn_cfg") or {}).pop("eval_aux", None)
        self._weights = weights
        self._teacher_arguments = teacher
        # In a tuple, so that it is no submodule.
        self._teacher: tuple[nn.Module, ...] = ()

    def loss(self, batch_inputs: Tensor, batch_data_samples: Any) -> dict[str, Any]:
        """The plain detector's losses, and `loss_distill_*`."""
        seen: dict[str, Any] = {}
        # The head is called once, inside its own `loss`.
        hook = self.bbox_head.register_forward_hook(
            lambda _, inputs, outputs: seen.update(features=inputs[0], outputs=outputs)
        )
        try:
            losses: dict[str, Any] = super().loss(batch_inputs, batch_data_samples)
        finally:
            hook.remove()
        teacher: Any = self._loaded_teacher(batch_inputs.device)
        with torch.no_grad():
            features = teacher.extract_feat(batch_inputs)
            scores, boxes, *_ = teacher.bbox_head(features)
        own_scores, own_boxes, *_ = seen["outputs"]
        bins = getattr(self.bbox_head, "reg_max", -1) + 1
        terms = {
            "features": lambda: feature_loss(seen["features"], features),
            "scores": lambda: score_loss(own_scores, scores),
            "boxes": lambda: box_loss(own_boxes, boxes, scores, bins=bins),
        }
        used = {name: weight for name, weight in self._weights.items() if weight}
        return losses | {f"loss_distill_{name}": weight * terms[name]() for name, weight in used.items()}

    def _loaded_teacher(self, device: torch.device) -> nn.Module:
        if not self._teacher:
            if not self._checkpoint:
                raise ValueError(
                    "model.distillation.checkpoint: expected the file of a softmax training; give it with "
                    "--cfg-options model.distillation.checkpoint=FILE"
                )
            teacher = SingleStageDetector(**copy.deepcopy(self._teacher_arguments)).eval().requires_grad_(False)
            load = WEIGHT_INITIALIZERS.build(dict(type="castling_det.TrainedDetector", checkpoint=self._checkpoint))
            load(teacher)
            self._teacher = (teacher.to(device),)
        return self._teacher[0]


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the maps (B, C, H, W) over the teacher's mean square, averaged over the levels."""
    ratios = [F.mse_loss(own, other) / other.square().mean() for own, other in zip(student, teacher, strict=True)]
    return torch.stack(ratios).mean()


def score_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Quality focal loss (gamma 2) of the logits (B, classes, H, W) against the teacher's probabilities, per object."""
    own, other = flattened(student), flattened(teacher).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(own, other, reduction="none")
    return (entropy * (own.sigmoid() - other).square()).sum() / _objects(other)


def box_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], teacher_scores: Sequence[Tensor], *, bins: int = 0
) -> Tensor:
    """Difference of the boxes (B, 4 * bins, H, W), weighted by the teacher's best score at each place.

    Distributions of `bins` values a side are compared by Kullback-Leibler divergence, with `bins=0` boxes by smooth L1.
    `teacher_scores` are logits (B, classes, H, W).
    """
    own, other, scores = flattened(student), flattened(teacher), flattened(teacher_scores).sigmoid()
    if bins and own.shape[-1] == 4 * bins:
        own, other = (x.unflatten(-1, (4, bins)).log_softmax(dim=-1) for x in (own, other))
        difference = F.kl_div(own, other, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)
    else:
        difference = F.smooth_l1_loss(own, other, reduction="none").mean(dim=-1)
    return (difference * scores.amax(dim=-1)).sum() / _objects(scores)


def _objects(scores: Tensor) -> Tensor:
    """The sum of the best scores at each place, at least 1: about the number of objects that the teacher sees."""
    return scores.amax(dim=-1).sum().clamp_min(1.0)
