"""Images larger than the network's input, tile by tile, through SAHI (`pip install castling-det[sahi]`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from sahi.models.base import DetectionModel
from sahi.predict import get_sliced_prediction
from sahi.prediction import ObjectPrediction

from castling_det.runtime.detections import Backend, Detections, Image

__all__ = ["TileModel", "detect_tiled"]


class TileModel(DetectionModel):
    """A detector of ours as SAHI's `DetectionModel`; takes whole batches of tiles."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(model=backend, confidence_threshold=0.0)

    def set_device(self, device: str | None = None) -> None:
        """The backend chose its device; SAHI would set CUDA_VISIBLE_DEVICES for the whole process."""
        self.device = device or "cpu"

    def set_model(self, model: Any, **_: Any) -> None:
        """Takes a loaded detector."""
        self.model = model
        self.category_mapping = {str(label): name for label, name in enumerate(model.classes)}

    def perform_inference(self, image: Image) -> None:
        """One tile."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: list[Image]) -> None:
        """The tiles of a batch at once."""
        self._original_predictions = self.model.detect(images)

    def _create_object_prediction_list_from_original_predictions(
        self, shift_amount_list: Any = None, full_shape_list: Any = None
    ) -> None:
        shifts = shift_amount_list or [[0, 0]] * len(self._original_predictions)
        self._object_prediction_list_per_image = [
            [
                ObjectPrediction(bbox=box, category_id=int(label), category_name=name, score=score, shift_amount=shift)
                for box, score, label, name in zip(
                    found.boxes.tolist(), found.scores.tolist(), found.labels, found.names, strict=True
                )
            ]
            for found, shift in zip(self._original_predictions, shifts, strict=True)
        ]


def detect_tiled(
    backend: Backend, image: Image, *, tile: int, overlap: float = 0.2, batch_size: int = 1, iou_threshold: float = 0.5
) -> Detections:
    """Detects in tiles and merges.

    Args:
        backend: the detector of one tile.
        image: any size.
        tile: side of the square tiles in pixels of the image. The last of a row or column are shifted inwards.
        overlap: of neighbouring tiles, as a fraction of `tile` in [0, 1).
        batch_size: tiles that are given to the detector at once.
        iou_threshold: of two boxes of one class, the lower is dropped where the intersection is more than this part of
            the smaller one: a tree that a tile's border cuts is inside the whole one of the neighbouring tile.
    """
    result = get_sliced_prediction(
        image,
        TileModel(backend),
        slice_height=tile,
        slice_width=tile,
        overlap_height_ratio=overlap,
        overlap_width_ratio=overlap,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOS",
        postprocess_match_threshold=iou_threshold,
        force_postprocess_type=True,
        batch_size=batch_size,
        verbose=0,
    )
    found = sorted(result.object_prediction_list, key=lambda one: -one.score.value)
    return Detections(
        np.array([one.bbox.to_xyxy() for one in found], dtype=np.float32).reshape(-1, 4),
        np.array([one.score.value for one in found], dtype=np.float32),
        np.array([one.category.id for one in found], dtype=np.int64),
        backend.classes,
    )
