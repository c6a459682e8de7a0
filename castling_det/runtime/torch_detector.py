"""A detector that PyTorch and MMDetection run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.datasets import CocoDataset
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from castling_det.config import load_config
from castling_det.conversion import load_checkpoint
from castling_det.conversion.detectors import build_detector, load_weights, with_attention
from castling_det.runtime.detections import Detections, Image, in_groups
from castling_det.runtime.sources import UnreadableImage

__all__ = ["TorchDetector", "class_names"]


class TorchDetector:
    """A checkpoint of a training (its averaged weights where EMAHook left them) or of a conversion, and its config.

    The config's test pipeline prepares the images.
    """

    def __init__(
        self, checkpoint: str | os.PathLike[str], config: str | os.PathLike[str], *, device: str = "cpu"
    ) -> None:
        self.config = load_config(config)
        attention = (self.config.get("model", {}).get("backbone") or {}).get("attention")
        content = load_checkpoint(checkpoint)
        # The copy has no initial weights to load.
        model = build_detector(with_attention(self.config, attention) if attention else self.config)
        load_weights(model, content, checkpoint)
        try:
            self.model: Any = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}; expected 'cpu' or 'cuda'") from error
        meta = content.get("meta") or {}
        self.classes = class_names(meta, self.config)
        self._palette = (meta.get("dataset_meta") or {}).get("palette") or "random"
        self._pipeline = _pipeline(self.config)
        self._visualizer: DetLocalVisualizer | None = None

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image; UnreadableImage for one that the pipeline cannot prepare, such as a narrow one."""
        prepared = [self._prepared(image) for image in images]

        def run(indices: list[int]) -> list[Detections]:
            with torch.inference_mode():
                results = self.model.test_step(pseudo_collate([prepared[index] for index in indices]))
            return [self._detections(result.pred_instances.cpu()) for result in results]

        return in_groups([tuple(data["inputs"].shape) for data in prepared], run)

    def draw(self, image: Image, detections: Detections) -> Image:
        """The picture of MMDetection's visualizer."""
        if self._visualizer is None:
            self._visualizer = DetLocalVisualizer()
            self._visualizer.dataset_meta = {"classes": self.classes, "palette": self._palette}
        fields = {"bboxes": detections.boxes, "scores": detections.scores, "labels": detections.labels}
        found = InstanceData(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()})
        rgb = np.ascontiguousarray(image[:, :, ::-1])
        sample = DetDataSample(pred_instances=found)
        self._visualizer.add_datasample("image", rgb, sample, draw_gt=False, pred_score_thr=0.0)
        return np.ascontiguousarray(self._visualizer.get_image()[:, :, ::-1])

    def _prepared(self, image: Image) -> Any:
        try:
            return self._pipeline({"img": image, "img_id": 0})
        except Exception as error:  # a transform fails in any way
            (height, width), lines = image.shape[:2], str(error).strip().splitlines() or [type(error).__name__]
            problem = f"the config's test pipeline cannot prepare it ({lines[-1]:.100})"
            raise UnreadableImage(f"{height} x {width} pixels: {problem}") from error

    def _detections(self, found: Any) -> Detections:
        scores = found.scores.numpy().astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        boxes, labels = found.bboxes.numpy().astype(np.float32), found.labels.numpy().astype(np.int64)
        return Detections(boxes[order], scores[order], labels[order], self.classes)


def class_names(meta: Any, config: Config) -> tuple[str, ...]:
    """Of the checkpoint's meta, else of the config's test data, else COCO's where the number fits, else numbers."""
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    named = (meta.get("dataset_meta") or {}).get("classes") or (dataset.get("metainfo") or {}).get("classes")
    if named:
        return (named,) if isinstance(named, str) else tuple(map(str, named))
    head = config.model.get("bbox_head") or (config.model.get("roi_head") or {}).get("bbox_head") or {}
    count = int(head.get("num_classes", 80))
    coco = tuple(CocoDataset.METAINFO["classes"])
    return coco if dataset.get("type") == "CocoDataset" and len(coco) == count else tuple(map(str, range(count)))


def _pipeline(config: Config) -> Compose:
    if "test_dataloader" not in config:
        raise ValueError(f"config {config.filename}: has no test_dataloader, whose pipeline prepares the images")
    steps = [dict(step) for step in get_test_pipeline_cfg(config) if "Annotations" not in str(step["type"])]
    return Compose([dict(type="mmdet.LoadImageFromNDArray"), *steps[1:]])
