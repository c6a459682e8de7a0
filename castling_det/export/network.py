"""A detector as one module from images to boxes, scores and labels, without anything that depends on values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead, RTMDetHead
from mmdet.models.detectors import DINO, SingleStageDetector, TwoStageDetector
from torch import Tensor, nn

from castling_det.export.dense import DenseDecoder, PostProcessing, RawMaps
from castling_det.export.dino import DinoDecoder
from castling_det.export.inputs import Normalization, normalization
from castling_det.export.metadata import OUTPUT_NAMES
from castling_det.export.precision import hold_norms_in_float32
from castling_det.export.sizes import keep_sizes_simple
from castling_det.export.two_stage import TwoStageDecoder
from castling_det.models import fuse_detector

__all__ = ["DeployedDetector"]


class DeployedDetector(nn.Module):
    """MMDetection's detector, from images as they were read to a fixed number of rows an image.

    Args:
        detector: in eval mode; it is copied.
        preprocessing: take BGR images of 0 to 255; otherwise what the detector's data preprocessor returns.
        half: weights and features in float16. Norms, the accumulation of the attention, and everything from the
            head's maps on stay in float32.
        nms_as_operator: see `selection.keep_by_nms`; True for ONNX.

    Attributes:
        max_per_img: rows an image. score_thr: of the detections.
        notes: what the file lacks, in words.
        head_attention: paths of modules in which the detector's own head attends by softmax, whatever the backbone.
        min_units: least height and width, in `pad_size_divisor`, that the detector is traced and compared with.
        nms_iou: overlap of suppression, None without it.

    Raises:
        ValueError: a detector or a setting that has no exported form.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, detector: nn.Module, *, preprocessing: bool = True, half: bool = False, nms_as_operator: bool = True
    ) -> None:
        super().__init__()
        if detector.training:
            raise ValueError("detector: is in training mode; call eval() before it is exported")
        detector = copy.deepcopy(detector).requires_grad_(False)
        # Before the precision changes: the folded weights are rounded once.
        fuse_detector(detector)
        keep_sizes_simple(detector)
        self.normalization: Normalization = normalization(detector)
        self.preprocessing = preprocessing
        self.half_precision = half
        self.notes: tuple[str, ...] = ()
        self.head_attention: tuple[str, ...] = ()
        # A map with a single row or column would be traced as one that has no other size.
        self.min_units = max(2, 2 * _coarsest_stride(detector) // self.normalization.pad_size_divisor)
        self.nms_iou: float | None
        if half:
            detector.half()
            hold_norms_in_float32(detector)
        self.decoder = self._decoder(detector, nms_as_operator)
        self.detector: Any = detector
        channels = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(self.normalization.mean).view(channels), persistent=False)
        self.register_buffer("std", torch.tensor(self.normalization.std).view(channels), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, 3, H, W) float32 to `boxes` (B, N, 4), `scores`, `labels` (B, N), and the head's maps by name."""
        hw = (images.shape[-2], images.shape[-1])
        maps = self.maps(images)
        found = self.decoder(maps, hw)
        rows = dict(zip(OUTPUT_NAMES, (found.boxes, found.scores, found.labels), strict=True))
        return {**rows, **{f"raw_{name}": value for name, value in maps.items()}}

    def maps(self, images: Tensor) -> RawMaps:
        """What the head itself returns, in float32."""
        features = self._features(images)
        if isinstance(self.decoder, TwoStageDecoder):
            return self.decoder.maps(features, (images.shape[-2], images.shape[-1]))
        assert isinstance(self.decoder, (DenseDecoder, DinoDecoder))
        return self.decoder.maps(features)

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        x = images
        if self.preprocessing:
            x = x.flip(1) if self.normalization.bgr_to_rgb else x
            x = (x - self.mean) / self.std
        features = self.detector.backbone(x.half() if self.half_precision else x)
        return tuple(self.detector.neck(features) if self.detector.with_neck else features)

    def _decoder(self, detector: Any, nms_as_operator: bool) -> nn.Module:
        if isinstance(detector, DINO):
            self.score_thr, self.nms_iou = 0.0, None
            # Its decoder attends over its queries and weights the points that it samples.
            self.head_attention = ("decoder",)
            # It picks its queries from the tokens, and needs an image that has as many.
            self.min_units = max(6, self.min_units)
            self.notes += (
                "the decoder of DINO attends over its own queries by softmax",
                "padding is seen as image: give batches of images of one size for the detections of MMDetection",
            )
            dino = DinoDecoder(detector)
            self.max_per_img = dino.max_per_img
            return dino
        if isinstance(detector, TwoStageDetector):
            two_stage = TwoStageDecoder(detector, nms_as_operator=nms_as_operator)
            decoder: nn.Module = two_stage
            settings = two_stage.settings
            if detector.roi_head.with_mask:
                self.notes += ("boxes only: the mask branch is left out",)
        elif isinstance(detector, SingleStageDetector) and isinstance(detector.bbox_head, (AnchorHead, RTMDetHead)):
            settings = PostProcessing.of(detector.test_cfg, "test_cfg")
            decoder = DenseDecoder(detector.bbox_head, settings, nms_as_operator=nms_as_operator)
        else:
            raise ValueError(
                f"{type(detector).__name__}: expected a single-stage detector with an anchor, GFL, PicoDet or RTMDet "
                "head, or Faster or Mask R-CNN, or DINO; no other family is exported"
            )
        self.score_thr, self.nms_iou = settings.score_thr, settings.nms_iou
        self.max_per_img = settings.max_per_img
        return decoder


def _coarsest_stride(detector: nn.Module) -> int:
    """In pixels, of the maps that the head or the RPN predicts on; 0 where none says so."""
    heads = (getattr(detector, name, None) for name in ("bbox_head", "rpn_head"))
    generators = [getattr(head, "prior_generator", None) for head in heads]
    strides = [stride for generator in generators if generator is not None for stride in generator.strides]
    return int(max((max(stride) if isinstance(stride, tuple) else stride for stride in strides), default=0))
