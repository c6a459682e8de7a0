"""Ground truth and detections of a data set in COCO's format, and the comparison of two detectors image by image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from castling_det.report.matching import Boxes, match
from castling_det.report.record import Comparison, ImageComparison
from castling_det.report.work_dir import read_json

__all__ = ["Annotations", "compare"]

_MAX_DETECTIONS = 100
"""COCO's limit of detections an image."""


class Annotations:
    """A COCO annotation file.

    Args:
        path: the JSON file.
        description: what to call the data set in a report; None takes the file's name and counts.

    Raises:
        ValueError: not a COCO annotation file; names the field.
    """

    def __init__(self, path: Path, *, description: str | None = None) -> None:
        document = read_json(path)
        missing = [key for key in ("images", "annotations", "categories") if key not in document]
        if missing:
            raise ValueError(f"{path}: no {', '.join(missing)}; expected a COCO annotation file")
        self.path = path
        self.document: dict[str, Any] = document
        """The file's content, not to be changed."""
        self.file_names: dict[int, str] = {int(image["id"]): str(image["file_name"]) for image in document["images"]}
        shapes = Counter(
            (int(i["height"]), int(i["width"])) for i in document["images"] if "height" in i and "width" in i
        )
        self.image_shape = shapes.most_common(1)[0][0] if shapes else None
        """Height and width that most images have, in pixels; None if the file does not say."""
        self.categories: dict[int, str] = {int(item["id"]): str(item["name"]) for item in document["categories"]}
        self._truth = _by_image(document["annotations"])
        boxes = sum(not annotation.get("iscrowd", 0) for annotation in document["annotations"])
        self.description = description or f"{path}: {len(self.file_names)} images, {boxes} boxes"

    def truth(self, image_id: int) -> Boxes:
        """The annotated boxes of an image."""
        return _boxes(self._truth.get(image_id, []))

    def results(self, path: Path) -> list[dict[str, Any]]:
        """The boxes of a COCO results file.

        Raises:
            ValueError: not a results file, or it has images or categories that are not in the annotations.
        """
        document = read_json(path)
        fields = ("image_id", "category_id", "bbox", "score")
        rows: list[dict[str, Any]] = document if isinstance(document, list) else [{}]
        if not all(isinstance(row, dict) and all(field in row for field in fields) for row in rows):
            raise ValueError(f"{path}: expected a COCO results file, a list of boxes with {', '.join(fields)}")
        for field, known in (("image_id", self.file_names), ("category_id", self.categories)):
            unknown = sorted({int(row[field]) for row in rows} - set(known))
            if unknown:
                kind = field.removesuffix("_id")
                raise ValueError(
                    f"{path}: {kind} ids {unknown[:5]} are not in {self.path}; give the annotation file that was "
                    "tested on"
                )
        return rows

    def detections(self, path: Path) -> dict[int, Boxes]:
        """The boxes of a COCO results file by image, the 100 best of each, best first.

        Raises:
            ValueError: see `results`.
        """
        return {
            image_id: _boxes(sorted(rows, key=lambda row: -float(row["score"]))[:_MAX_DETECTIONS])
            for image_id, rows in _by_image(self.results(path)).items()
        }


def compare(
    annotations: Annotations,
    baseline: Mapping[int, Boxes],
    deployed: Mapping[int, Boxes],
    *,
    names: tuple[str, str],
    seed: int | None,
    score_threshold: float = 0.3,
    iou: float = 0.5,
) -> Comparison:
    """Counts right, wrong and missed boxes of both on every image, and sorts by the difference in F1, largest first.

    Of equal differences, those by which the deployed one is worse stand first.
    """
    images = []
    for image_id, file_name in annotations.file_names.items():
        truth = annotations.truth(image_id)
        counts = [
            match(detections.get(image_id, _boxes([])).at_least(score_threshold), truth, iou=iou).counts
            for detections in (baseline, deployed)
        ]
        images.append(ImageComparison(image_id, file_name, *counts))
    images.sort(key=lambda image: (-abs(image.f1_difference), image.f1_difference, image.file_name))
    return Comparison(*names, seed=seed, score_threshold=score_threshold, iou=iou, images=tuple(images))


def _by_image(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[int(row["image_id"])].append(row)
    return grouped


def _boxes(rows: list[dict[str, Any]]) -> Boxes:
    xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return Boxes(
        xyxy=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        labels=np.array([row["category_id"] for row in rows], dtype=np.int64),
        scores=np.array([row.get("score", 1.0) for row in rows], dtype=np.float64),
        crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
    )
