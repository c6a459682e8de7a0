"""Predictions in COCO's format, and drawn pictures; every file is whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2

from castling_det.files import atomic_write
from castling_det.runtime.detections import Detections, Image
from castling_det.runtime.sources import IMAGE_SUFFIXES

__all__ = ["IMAGES", "PREDICTIONS", "CocoPredictions", "write_picture"]

PREDICTIONS = "predictions.json"
IMAGES = "images.json"


class CocoPredictions:
    """Gathers detections and writes them as COCO results, with the images and categories that they are about.

    Args:
        classes: names by label.
        annotations: an existing COCO file whose image and category ids are taken; without one images count from 1 in
            their order, categories from 1 in the order of the labels.

    Raises:
        ValueError: the file is not COCO's, or lacks one of the classes.
    """

    def __init__(self, classes: tuple[str, ...], annotations: str | os.PathLike[str] | None = None) -> None:
        self.classes = classes
        self._entries: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._known: dict[str, int] | None = None
        self.category_ids = tuple(range(1, len(classes) + 1))
        if annotations is not None:
            self._known, categories = _read_ids(Path(annotations))
            missing = [name for name in classes if name not in categories]
            if missing:
                raise ValueError(
                    f"annotations {annotations}: no category {', '.join(missing)}, which the detector knows; it has "
                    f"{', '.join(categories)}"
                )
            self.category_ids = tuple(categories[name] for name in classes)

    def add(self, name: str, hw: tuple[int, int], detections: Detections) -> None:
        """One image's detections.

        Raises:
            ValueError: the annotations have no image of this name.
        """
        image_id = len(self._images) + 1 if self._known is None else self._known.get(Path(name).name)
        if image_id is None:
            raise ValueError(f"{name}: no image of this file_name in the annotations; run on their images only")
        self._images.append({"id": image_id, "file_name": name, "height": hw[0], "width": hw[1]})
        self._entries += detections.to_coco(image_id, self.category_ids)

    def write(self, folder: Path) -> None:
        """`predictions.json` (a list, as `COCO.loadRes` reads it) and `images.json` (its images and categories)."""
        categories = [
            {"id": number, "name": name} for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        described = {"images": self._images, "annotations": [], "categories": categories}
        # Both contents are on disk before either file takes its name.
        with atomic_write(folder / IMAGES) as images_part, atomic_write(folder / PREDICTIONS) as predictions_part:
            images_part.write_text(json.dumps(described, ensure_ascii=False) + "\n", encoding="utf-8")
            predictions_part.write_text(json.dumps(self._entries, allow_nan=False) + "\n", encoding="utf-8")


def write_picture(path: Path, picture: Image) -> None:
    """In the format of the path's suffix, PNG for one that is not an image's."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        path = path.with_name(f"{path.name}.png")
    done, content = cv2.imencode(path.suffix, picture)
    if not done:
        raise OSError(None, "OpenCV cannot encode the picture", str(path))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.tobytes())


def _read_ids(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Image ids by file name (without folders) and category ids by name."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        images = {Path(image["file_name"]).name: int(image["id"]) for image in document["images"]}
        categories = {str(category["name"]): int(category["id"]) for category in document["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"annotations {path}: not a readable COCO file ({type(error).__name__}: {error})") from None
    if len(images) < len(document["images"]):
        raise ValueError(f"annotations {path}: two images have one file_name; rename one")
    return images, categories
