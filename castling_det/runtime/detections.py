"""What a detector finds in one image."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Backend", "Detections", "Image", "in_groups"]

Image = NDArray[np.uint8]
"""(height, width, 3), BGR, as OpenCV reads files."""


@dataclass(frozen=True)
class Detections:
    """Boxes (n, 4) of one image as x1, y1, x2, y2 in its pixels, best score first; labels index `classes`."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        """The number of detections, and the best ten."""
        rows = zip(self.names[:10], self.scores.tolist(), self.boxes.round(1).tolist(), strict=False)
        lines = [f"{name} {score:.2f} at {', '.join(f'{side:g}' for side in box)}" for name, score, box in rows]
        return "\n".join([f"{len(self)} detections", *lines, *(["..."] if len(self) > 10 else [])])

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each box."""
        return tuple(self.classes[label] for label in self.labels)

    def above(self, score: float) -> Detections:
        """The detections whose score is at least `score`."""
        return self._where(self.scores >= score)

    def inside(self, hw: tuple[int, ...]) -> Detections:
        """The detections clipped to an image of this height and width; boxes outside of it are dropped."""
        boxes = np.clip(self.boxes, 0, np.array([hw[1], hw[0], hw[1], hw[0]], dtype=np.float32))
        clipped = Detections(boxes, self.scores, self.labels, self.classes)
        return clipped._where((boxes[:, 2:] > boxes[:, :2]).all(axis=1))

    def to_coco(self, image_id: int, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
        """COCO's result entries; `category_ids` has one for each class. Boxes are x, y, width, height."""
        entries = []
        for (x1, y1, x2, y2), score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels, strict=True):
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            found = {"category_id": category_ids[label], "bbox": box, "score": round(score, 5)}
            entries.append({"image_id": image_id, **found})
        return entries

    def _where(self, keep: Any) -> Detections:
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.classes)


class Backend(Protocol):
    """A loaded detector, whatever runs it."""

    classes: tuple[str, ...]

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image, in its own pixels."""


def in_groups(keys: Sequence[Hashable], run: Callable[[list[int]], list[Detections]]) -> list[Detections]:
    """Runs once for each distinct key, such as a size, on the indices that have it; results in the order of `keys`."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    found = {index: one for indices in groups.values() for index, one in zip(indices, run(indices), strict=True)}
    return [found[index] for index in range(len(keys))]
