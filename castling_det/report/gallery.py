"""Pictures of the images on which two detectors differ most: ground truth, baseline and deployed boxes side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from castling_det.report.evaluation import Annotations, Box, Found
from castling_det.report.records import Comparison, ImageComparison

BOXES = {"truth": "#ffffff", "right": "#4cc3ff", "wrong": "#ff7f0e", "missed": "#fff200"}
"""Colours on photographs: annotated, found rightly, found wrongly, missed."""

_SIDE = 512  # pixels of a picture's longer side, at least: lines stay thin beside the objects of enlarged tiles
_MARGIN = 8  # pixels outside of a picture in which boxes are drawn: their lines do not show


class Row(NamedTuple):
    """One image of the gallery as three pictures of equal size."""

    image: ImageComparison
    truth: Image.Image
    baseline: Image.Image
    deployed: Image.Image


def gallery(
    comparison: Comparison, annotations: Annotations, images: Path, found: Sequence[Mapping[int, Found]], count: int
) -> list[Row]:
    """Draws the first `count` images of a comparison with the boxes of baseline and deployed detector.

    ValueError names a file that is missing, outside of the folder `images` or cannot be decoded.
    """
    rows = []
    for image in comparison.images[:count]:
        picture, scale = _load(images, image.file_name)
        truth = picture.copy()
        for row in annotations.document["annotations"]:
            if row["image_id"] == image.image_id:
                crowd = bool(row.get("iscrowd"))
                _outline(truth, row["bbox"], scale, BOXES["truth"], dashed=crowd, width=1 if crowd else 3)
        rows.append(Row(image, truth, *(_draw(picture, boxes.get(image.image_id, Found()), scale) for boxes in found)))
    return rows


def strip(row: Row, titles: tuple[str, str, str]) -> Image.Image:
    """The three pictures of a row beside each other, each under its title."""
    width, height = row.truth.size
    head, gap = 24, 8
    whole = Image.new("RGB", (3 * width + 2 * gap, height + head), "white")
    for number, (picture, title) in enumerate(zip((row.truth, row.baseline, row.deployed), titles, strict=True)):
        left = number * (width + gap)
        ImageDraw.Draw(whole).text((left + 4, 4), title, fill="black", font_size=14)
        whole.paste(picture, (left, head))
    return whole


def _load(folder: Path, name: str) -> tuple[Image.Image, float]:
    """The image in RGB, its longer side brought to 512 to 1024 pixels, and the factor."""
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"file_name={name!r}: expected a path inside of --images {folder}; a report shows no others")
    path = folder / name
    if not os.path.isfile(path):
        problem = "not a regular file" if os.path.exists(path) else "no such image"
        raise ValueError(f"{path}: {problem}; give the folder of the tested images as --images")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error
    longer = max(picture.size)
    scale = _SIDE / longer if longer < _SIDE else min(1.0, 2 * _SIDE / longer)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.LANCZOS), scale


def _draw(picture: Image.Image, found: Found, scale: float) -> Image.Image:
    drawn = picture.copy()
    for kind, boxes in (("missed", found.missed), ("right", found.right), ("wrong", found.wrong)):
        for box in boxes:
            _outline(drawn, box, scale, BOXES[kind], dashed=kind == "missed")
    return drawn


def _outline(picture: Image.Image, box: Box, scale: float, color: str, *, dashed: bool = False, width: int = 3) -> None:
    """A line on a dark one that is wider, so that it shows on any photograph."""
    draw = ImageDraw.Draw(picture)
    x, y, box_width, box_height = (value * scale for value in box)
    # However large a box is, no more of it is drawn than the picture can show.
    x0, x1 = np.clip([x, x + box_width], -_MARGIN, picture.width + _MARGIN).tolist()
    y0, y1 = np.clip([y, y + box_height], -_MARGIN, picture.height + _MARGIN).tolist()
    for (ax, ay), (bx, by) in pairwise([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]):
        length = max(abs(bx - ax), abs(by - ay), 1.0)
        dash = 7.0 if dashed else length
        for step in range(math.ceil(length / (2 * dash))):
            start, end = 2 * dash * step, min(2 * dash * step + dash, length)
            line = [(ax + (bx - ax) * part / length, ay + (by - ay) * part / length) for part in (start, end)]
            draw.line(line, fill="#101010", width=width + 2)
            draw.line(line, fill=color, width=width)
