"""What a detector finds in one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "Detections", "Image"]

Image = NDArray[np.uint8]
"""(height, width, 3), BGR, as OpenCV reads files."""


@dataclass(frozen=True)
class Detections:
    """Boxes of one image, best score first."""

    boxes: NDArray[np.float32]
    """(n, 4), x1, y1, x2, y2 in pixels of the image."""
    scores: NDArray[np.float32]
    """(n,), in [0, 1]."""
    labels: NDArray[np.int64]
    """(n,), indices into `classes`."""
    classes: tuple[str, ...]
    """Names of all classes that the detector knows."""

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each box."""
        return tuple(self.classes[label] for label in self.labels)

    def above(self, score: float) -> Detections:
        """Those whose score is at least `score`."""
        keep = self.scores >= score
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.classes)

    def to_coco(self, image_id: int, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
        """COCO's result entries; `category_ids` has one for each class. Boxes are x, y, width, height."""
        entries = []
        for (x1, y1, x2, y2), score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels, strict=True):
            box = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
            entries.append(
                {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": round(score, 5)}
            )
        return entries


class Backend(Protocol):
    """A loaded detector, whatever runs it."""

    classes: tuple[str, ...]

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image, in its own pixels."""
