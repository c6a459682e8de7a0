"""A detector that PyTorch and MMDetection run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from castling_det.config import load_config
from castling_det.conversion import load_checkpoint
from castling_det.conversion.detectors import build_detector, load_weights, with_attention
from castling_det.runtime.detections import Detections, Image

__all__ = ["TorchDetector"]


class TorchDetector:
    """A checkpoint and its config.

    Args:
        checkpoint: a training's (the averaged weights where EMAHook left them) or a converted one.
        config: file or `castling_det::...`; its test pipeline prepares the images.
        device: as torch names it.

    Attributes:
        classes: names by label, from the checkpoint's meta, else from the config.

    Raises:
        ValueError: unusable file, config or device; names it.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], config: str | os.PathLike[str], *, device: str = "cpu"
    ) -> None:
        self.config = load_config(config)
        content = load_checkpoint(checkpoint)
        model = build_detector(_without_initial_weights(self.config))
        load_weights(model, content, checkpoint)
        try:
            self.model: Any = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}; expected 'cpu' or 'cuda'") from error
        meta = (content.get("meta") or {}).get("dataset_meta") or {}
        self.classes = _classes(meta, self.config)
        self._palette = meta.get("palette")
        self._pipeline = _pipeline(self.config)
        self._visualizer: DetLocalVisualizer | None = None

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image; those of one size behind the pipeline share a batch."""
        prepared = [self._pipeline({"img": image, "img_id": index}) for index, image in enumerate(images)]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, data in enumerate(prepared):
            groups.setdefault(tuple(data["inputs"].shape), []).append(index)
        found: dict[int, Detections] = {}
        for indices in groups.values():
            with torch.inference_mode():
                results = self.model.test_step(pseudo_collate([prepared[index] for index in indices]))
            found |= {index: self._detections(result) for index, result in zip(indices, results, strict=True)}
        return [found[index] for index in range(len(images))]

    def draw(self, image: Image, detections: Detections) -> Image:
        """The picture of MMDetection's visualizer."""
        if self._visualizer is None:
            self._visualizer = DetLocalVisualizer()
            self._visualizer.dataset_meta = {"classes": self.classes, "palette": self._palette or "random"}
        instances = InstanceData(
            bboxes=torch.from_numpy(np.ascontiguousarray(detections.boxes)),
            scores=torch.from_numpy(np.ascontiguousarray(detections.scores)),
            labels=torch.from_numpy(np.ascontiguousarray(detections.labels)),
        )
        rgb = np.ascontiguousarray(image[:, :, ::-1])
        sample = DetDataSample(pred_instances=instances)
        self._visualizer.add_datasample("image", rgb, sample, draw_gt=False, pred_score_thr=0.0)
        return np.ascontiguousarray(self._visualizer.get_image()[:, :, ::-1])

    def _detections(self, sample: Any) -> Detections:
        found = sample.pred_instances
        scores = found.scores.cpu().numpy().astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        boxes = found.bboxes.cpu().numpy().astype(np.float32)
        return Detections(boxes[order], scores[order], found.labels.cpu().numpy().astype(np.int64)[order], self.classes)


def _without_initial_weights(config: Config) -> Config:
    attention = (config.get("model", {}).get("backbone") or {}).get("attention")
    return with_attention(config, attention) if attention else config


def _classes(meta: dict[str, Any], config: Config) -> tuple[str, ...]:
    classes = meta.get("classes")
    if classes is None:
        dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
        classes = (dataset.get("metainfo") or {}).get("classes")
    if classes is None:
        raise ValueError(
            f"config {config.filename}: neither it nor the checkpoint names the classes; set "
            "test_dataloader.dataset.metainfo=dict(classes=(...))"
        )
    return (classes,) if isinstance(classes, str) else tuple(map(str, classes))


def _pipeline(config: Config) -> Compose:
    if "test_dataloader" not in config:
        raise ValueError(f"config {config.filename}: has no test_dataloader, whose pipeline prepares the images")
    steps = [dict(step) for step in get_test_pipeline_cfg(config) if "Annotations" not in str(step["type"])]
    return Compose([dict(type="mmdet.LoadImageFromNDArray"), *steps[1:]])
