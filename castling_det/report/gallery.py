"""Pictures of the images on which two detectors differ most: ground truth, baseline and deployed boxes side by side."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, UnidentifiedImageError

from castling_det.report.colors import BOXES
from castling_det.report.compare import Annotations
from castling_det.report.matching import Boxes, match
from castling_det.report.record import Comparison, ImageComparison

__all__ = ["Row", "data_uri", "gallery", "strip"]

_SIDE = 512
"""Pixels of a picture's longer side, at least: tiles are enlarged so that lines stay thin beside the objects."""


@dataclass(frozen=True)
class Row:
    """One image of the gallery as three pictures of equal size."""

    image: ImageComparison
    truth: Image.Image
    baseline: Image.Image
    deployed: Image.Image


def gallery(
    comparison: Comparison,
    annotations: Annotations,
    images: Path,
    baseline: Mapping[int, Boxes],
    deployed: Mapping[int, Boxes],
    *,
    count: int = 8,
) -> list[Row]:
    """Draws the first `count` images of a comparison, in its order.

    Args:
        comparison: says which images, from which score on, right at which IoU.
        annotations: ground truth.
        images: folder that the annotations' file names are relative to.
        baseline: detections of the baseline by image.
        deployed: detections of the deployed one by image.
        count: number of images, at most.

    Raises:
        ValueError: an image file that is missing or cannot be decoded; names it.
    """
    rows = []
    for image in comparison.images[:count]:
        picture, scale = _load(images / image.file_name)
        truth = annotations.truth(image.image_id)
        drawn = [_draw_truth(picture, truth, scale)]
        for detections in (baseline, deployed):
            found = detections.get(image.image_id)
            drawn.append(_draw_detections(picture, found, truth, scale, comparison))
        rows.append(Row(image, *drawn))
    return rows


def strip(row: Row, titles: tuple[str, str, str], *, gap: int = 8) -> Image.Image:
    """The three pictures of a row beside each other, `gap` pixels apart, each under its title."""
    pictures = (row.truth, row.baseline, row.deployed)
    width, height = row.truth.size
    head = 24
    whole = Image.new("RGB", (3 * width + 2 * gap, height + head), "white")
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left = number * (width + gap)
        ImageDraw.Draw(whole).text((left + 4, 4), title, fill="black", font_size=14)
        whole.paste(picture, (left, head))
    return whole


def data_uri(picture: Image.Image) -> str:
    """The picture inside of an address: JPEG, since photographs as PNG make a page of tens of megabytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _load(path: Path) -> tuple[Image.Image, float]:
    """The image in RGB, its longer side brought to 512 to 1024 pixels, and the factor."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image; give the folder of the tested images as --images") from error
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error
    longer = max(picture.size)
    scale = _SIDE / longer if longer < _SIDE else min(1.0, 2 * _SIDE / longer)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS), scale


def _draw_truth(picture: Image.Image, truth: Boxes, scale: float) -> Image.Image:
    drawn = picture.copy()
    for box, crowd in zip(truth.xyxy * scale, truth.crowd, strict=True):
        _rectangle(drawn, box, BOXES["truth"], dashed=bool(crowd), width=1 if crowd else 3)
    return drawn


def _draw_detections(
    picture: Image.Image, detections: Boxes | None, truth: Boxes, scale: float, comparison: Comparison
) -> Image.Image:
    drawn = picture.copy()
    empty = np.zeros(0)
    shown = detections or Boxes(np.zeros((0, 4)), empty.astype(np.int64), empty, empty.astype(bool))
    shown = shown.at_least(comparison.score_threshold)
    result = match(shown, truth, iou=comparison.iou)
    for box, found, crowd in zip(truth.xyxy * scale, result.found, truth.crowd, strict=True):
        if not found and not crowd:
            _rectangle(drawn, box, BOXES["missed"], dashed=True)
    for box, right, ignored in zip(shown.xyxy * scale, result.right, result.ignored, strict=True):
        if not ignored:
            _rectangle(drawn, box, BOXES["right" if right else "wrong"])
    return drawn


def _rectangle(
    picture: Image.Image, box: NDArray[np.float64], color: str, *, dashed: bool = False, width: int = 3
) -> None:
    """A line on a dark one that is wider, so that it shows on any photograph."""
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = (float(value) for value in box)
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    for (ax, ay), (bx, by) in pairwise(corners):
        length = max(abs(bx - ax), abs(by - ay), 1.0)
        dash = 7.0 if dashed else length
        for step in range(math.ceil(length / (2 * dash))):
            start, end = 2 * dash * step, min(2 * dash * step + dash, length)
            line = [(ax + (bx - ax) * part / length, ay + (by - ay) * part / length) for part in (start, end)]
            draw.line(line, fill="#101010", width=width + 2)
            draw.line(line, fill=color, width=width)
