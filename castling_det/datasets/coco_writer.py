"""Annotated source images in memory, and COCO annotation dicts built from them image by image."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .tiling import Box, Tile
from .voc import VocBoxes, parse_voc

__all__ = ["CocoWriter", "SourceImage", "load_source", "save_png"]


@dataclass(frozen=True)
class SourceImage:
    """An annotated image: RGB pixels without metadata, and its cleaned boxes."""

    name: str
    pixels: Image.Image
    annotations: VocBoxes


def load_source(name: str, png: bytes, xml: bytes) -> SourceImage:
    """Decodes an image of any 8-bit mode to RGB (alpha is dropped) and reads its VOC boxes.

    An orientation tag is not applied: the boxes are drawn on the stored pixels. Raises ValueError naming the
    source.
    """
    try:
        with Image.open(io.BytesIO(png)) as image:
            mode = image.mode
            rgb = image.convert("RGB")
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"{name}: not a readable image ({error}).") from error
    if mode.startswith(("I", "F")):
        raise ValueError(f"{name}: pixel format {mode!r} has more than 8 bits a channel; convert it.")
    # A fresh image carries no gamma, colour-profile or EXIF chunk that a decoder might act on.
    pixels = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    return SourceImage(name, pixels, parse_voc(xml, width=rgb.width, height=rgb.height, source=name))


def save_png(image: Image.Image, path: Path) -> None:
    """Lossless; the same pixels give the same bytes with the same Pillow."""
    image.save(path, format="PNG", compress_level=6)


class CocoWriter:
    """Collects images and boxes of one annotation file; ids count from 1 in the order of the calls.

    Each image also carries `source` and `offset` (its upper left pixel in the source image), each annotation
    `source_box` (its place among the source's cleaned boxes), `visible` (the shown fraction of the box) and,
    where it differs from the category, `source_label`.
    """

    def __init__(self, category: str, *, info: dict[str, Any]) -> None:
        self.category = category
        self.info = info
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add_image(self, file_name: str, source: SourceImage, tile: Tile) -> None:
        """Starts the next image; following boxes belong to it."""
        image = {
            "id": len(self.images) + 1,
            "file_name": file_name,
            "width": tile.width,
            "height": tile.height,
        }
        self.images.append({**image, "source": source.name, "offset": [tile.x, tile.y]})

    def add_box(self, source: SourceImage, index: int, box: Box, *, visible: float, ignored: bool) -> None:
        """Adds a box, in pixels of the image added last, that shows the source's box `index`."""
        bbox = [box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0]
        annotation: dict[str, Any] = {
            "id": len(self.annotations) + 1,
            "image_id": self.images[-1]["id"],
            "category_id": 1,
            "bbox": [int(value) if value == int(value) else value for value in bbox],
            "area": bbox[2] * bbox[3],
            "iscrowd": int(ignored),
            "source_box": index,
            "visible": round(visible, 4),
        }
        label = source.annotations.boxes[index].label
        if label.casefold() != self.category.casefold():
            annotation["source_label"] = label
        self.annotations.append(annotation)

    def as_dict(self) -> dict[str, Any]:
        """The COCO annotation dict."""
        return {
            "info": self.info,
            "images": self.images,
            "annotations": self.annotations,
            "categories": [{"id": 1, "name": self.category}],
        }
