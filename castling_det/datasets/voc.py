"""Boxes of a Pascal VOC XML file, cleaned, with a count of everything that was changed."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from .tiling import Box

__all__ = ["LabelledBox", "VocBoxes", "parse_voc"]


@dataclass(frozen=True)
class LabelledBox:
    """One box in pixels and the label that the file gives it."""

    box: Box
    label: str


@dataclass(frozen=True)
class VocBoxes:
    """Cleaned boxes in file order, and how many were clipped to the image or dropped, by reason."""

    boxes: tuple[LabelledBox, ...]
    clipped: int
    dropped_empty: int
    dropped_duplicate: int


def _corners(element: ElementTree.Element, where: str) -> Box:
    box = element.find("bndbox")
    values = []
    for name in ("xmin", "ymin", "xmax", "ymax"):
        text = box.findtext(name) if box is not None else None
        try:
            value = float(text) if text is not None else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{where}: <bndbox><{name}> is {text!r}, expected a finite number of pixels.")
        values.append(value)
    return Box(*values)


def parse_voc(xml: bytes, *, width: int, height: int, source: str) -> VocBoxes:
    """Reads the objects of a VOC file that annotates an image of `width` x `height` pixels.

    Corners are taken as continuous pixel coordinates, as the drawing tool wrote them: no offset of one is
    applied. Boxes are clipped to the image; those with less than a pixel left on a side, and repetitions of
    the same box and label, are dropped. A file that is no XML, or that states another image size, raises
    ValueError naming `source`.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"{source}: not a readable XML file ({error}).") from error
    stated = (root.findtext("size/width"), root.findtext("size/height"))
    if stated != (str(width), str(height)):
        raise ValueError(
            f"{source}: <size> says {stated[0]} x {stated[1]}, but its image is {width} x {height}: "
            "the boxes belong to another image."
        )
    kept: dict[LabelledBox, None] = {}
    clipped = empty = duplicate = 0
    for number, element in enumerate(root.iter("object")):
        raw = _corners(element, f"{source}, object {number}")
        box = Box(max(raw.x0, 0.0), max(raw.y0, 0.0), min(raw.x1, float(width)), min(raw.y1, float(height)))
        labelled = LabelledBox(box, (element.findtext("name") or "").strip())
        if box.x1 - box.x0 < 1.0 or box.y1 - box.y0 < 1.0:
            empty += 1
        elif labelled in kept:
            duplicate += 1
        else:
            clipped += box != raw
            kept[labelled] = None
    return VocBoxes(tuple(kept), clipped, empty, duplicate)
