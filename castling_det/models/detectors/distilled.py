"""A single-stage detector that learns from its own frozen softmax version beside the data."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from torch import Tensor, nn

from castling_det.models.detectors.distillation_losses import box_loss, feature_loss, score_loss
from castling_det.registry import MODELS

__all__ = ["DistilledSingleStage"]

_DEFAULT_WEIGHTS = {"features": 1.0, "scores": 1.0, "boxes": 1.0}


@MODELS.register_module()
class DistilledSingleStage(SingleStageDetector):
    """MMDetection's `SingleStageDetector` (GFL, RetinaNet, RTMDet and PicoDet are it by other names) with a teacher.

    The teacher has the same backbone, neck and head in the mode `attention="softmax"`, its weights from a checkpoint of
    that training. It is no part of the model: parameters, EMA and checkpoints hold the student alone, under the plain
    names. `tools/convert.py` makes a plain `SingleStageDetector` of it.

    Args:
        backbone, neck, bbox_head, train_cfg, test_cfg, data_preprocessor, init_cfg: as in the plain detector.
        distillation: `checkpoint`, a file of the softmax training, and the weights of the losses `features` (maps of
            the neck), `scores` and `boxes` (the head's outputs), each 1 by default; 0 leaves one out.

    Raises:
        ValueError: unknown or negative weights, a backbone without `attention`; with the first batch, no checkpoint, or
            one that is not this detector's.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        neck: dict[str, Any] | None = None,
        bbox_head: dict[str, Any] | None = None,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        *,
        distillation: dict[str, Any],
    ) -> None:
        self_args = (backbone, neck, bbox_head, train_cfg, test_cfg, data_preprocessor)
        # Before the head's config is written into, as MMDetection does.
        teacher_args = copy.deepcopy(self_args)
        super().__init__(*self_args, init_cfg)
        self._checkpoint, self._weights = _checked(distillation)
        if "attention" not in backbone:
            raise ValueError(
                "distillation: model.backbone has no `attention`, so there is no softmax version to learn from"
            )
        self._teacher_args = teacher_args
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
            outputs = teacher.bbox_head(features)
        weights = self._weights
        if weights["features"]:
            losses["loss_distill_features"] = weights["features"] * feature_loss(seen["features"], features)
        if weights["scores"]:
            losses["loss_distill_scores"] = weights["scores"] * score_loss(seen["outputs"][0], outputs[0])
        if weights["boxes"]:
            bins = getattr(self.bbox_head, "reg_max", None)
            boxes = box_loss(seen["outputs"][1], outputs[1], outputs[0], bins=None if bins is None else bins + 1)
            losses["loss_distill_boxes"] = weights["boxes"] * boxes
        return losses

    def _loaded_teacher(self, device: torch.device) -> nn.Module:
        if not self._teacher:
            if not self._checkpoint:
                raise ValueError(
                    "model.distillation.checkpoint: expected the file of a softmax training; give it with "
                    "--cfg-options model.distillation.checkpoint=FILE"
                )
            from castling_det.conversion.checkpoints import load_checkpoint
            from castling_det.conversion.detectors import load_weights

            backbone, *others = self._teacher_args
            backbone = {**backbone, "attention": "softmax", "init_cfg": None}
            backbone.pop("eval_aux", None)
            teacher = SingleStageDetector(backbone, *copy.deepcopy(others)).eval().requires_grad_(False)
            load_weights(teacher, load_checkpoint(self._checkpoint), self._checkpoint)
            self._teacher = (teacher.to(device),)
        return self._teacher[0]


def _checked(distillation: dict[str, Any]) -> tuple[str, dict[str, float]]:
    options = dict(distillation)
    checkpoint = options.pop("checkpoint", "")
    weights = {**_DEFAULT_WEIGHTS, **options}
    unknown = sorted(set(weights) - set(_DEFAULT_WEIGHTS))
    if unknown or not all(weight >= 0 for weight in weights.values()):
        raise ValueError(
            f"distillation={distillation}: expected checkpoint and weights >= 0 of {', '.join(_DEFAULT_WEIGHTS)}"
        )
    return str(checkpoint), weights
