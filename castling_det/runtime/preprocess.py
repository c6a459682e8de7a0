"""The pixels that MMDetection's test pipeline makes of an image, bit for bit, with numpy and OpenCV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from castling_det.runtime.detections import Image

__all__ = ["STEPS", "Prepared", "equalize", "padded_to_multiple", "prepare", "resized_hw", "size_of"]

_INTERPOLATIONS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
    "lanczos": cv2.INTER_LANCZOS4,
}


@dataclass(frozen=True)
class Prepared:
    """An image on its way into the network."""

    pixels: Image
    content_hw: tuple[int, int]
    """Height and width of the image itself in `pixels`; right and below of it is padding."""
    original_hw: tuple[int, int]

    def to_original(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes (n, 4) in `pixels`, clipped to the content, in the original image's pixels."""
        (height, width), (original_height, original_width) = self.content_hw, self.original_hw
        limits = np.array([width, height, width, height], dtype=np.float32)
        back = np.array([1 / (width / original_width), 1 / (height / original_height)] * 2, dtype=np.float32)
        scaled: NDArray[np.float32] = np.clip(boxes, 0, limits) * back
        return scaled


def size_of(image: Image) -> tuple[int, int]:
    """Height and width in pixels."""
    return image.shape[0], image.shape[1]


def prepare(image: Image, pipeline: Sequence[Mapping[str, Any]]) -> Prepared:
    """Applies the pipeline of an ONNX file's metadata, whose steps were checked when the file was read."""
    prepared = Prepared(image, size_of(image), size_of(image))
    for step in pipeline:
        prepared = STEPS[step["type"]](prepared, step)
    return prepared


def equalize(image: Image) -> Image:
    """Equalises the histogram of each channel as `mmcv.imequalize` (PIL's rule)."""
    out = np.empty_like(image)
    for channel in range(image.shape[2]):
        plane = image[:, :, channel]
        histogram = np.bincount(plane.ravel(), minlength=256)
        step = (plane.size - histogram[histogram > 0][-1]) // 255
        if step == 0:
            out[:, :, channel] = plane
            continue
        table = np.zeros(256, dtype=np.int64)
        table[1:] = (np.cumsum(histogram)[:-1] + step // 2) // step
        out[:, :, channel] = np.minimum(table, 255).astype(np.uint8)[plane]
    return out


def resized_hw(hw: tuple[int, int], scale: tuple[int, int], *, keep_ratio: bool) -> tuple[int, int]:
    """Height and width after a resize to `scale` (height, width), by MMDetection's rule."""
    if not keep_ratio:
        return scale
    factor = min(max(scale) / max(hw), min(scale) / min(hw))
    # At least one pixel: MMDetection fails on an image so narrow that nothing is left of it.
    return max(int(hw[0] * factor + 0.5), 1), max(int(hw[1] * factor + 0.5), 1)


def padded_to_multiple(hw: tuple[int, int], divisor: int) -> tuple[int, int]:
    """The smallest multiples of `divisor` that hold `hw`."""
    return -(-hw[0] // divisor) * divisor, -(-hw[1] // divisor) * divisor


def _equalize(prepared: Prepared, step: Mapping[str, Any]) -> Prepared:
    return Prepared(equalize(prepared.pixels), prepared.content_hw, prepared.original_hw)


def _resize(prepared: Prepared, step: Mapping[str, Any]) -> Prepared:
    scale = (int(step["scale"][0]), int(step["scale"][1]))
    height, width = resized_hw(size_of(prepared.pixels), scale, keep_ratio=bool(step["keep_ratio"]))
    pixels = cv2.resize(prepared.pixels, (width, height), interpolation=_INTERPOLATIONS[step["interpolation"]])
    return Prepared(pixels.astype(np.uint8, copy=False), (height, width), prepared.original_hw)


def _pad(prepared: Prepared, step: Mapping[str, Any]) -> Prepared:
    height, width = prepared.pixels.shape[:2]
    bottom, right = max(int(step["size"][0]) - height, 0), max(int(step["size"][1]) - width, 0)
    pixels = cv2.copyMakeBorder(
        prepared.pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=tuple(step["pad_values"])
    )
    return Prepared(pixels.astype(np.uint8, copy=False), prepared.content_hw, prepared.original_hw)


STEPS: dict[str, Callable[[Prepared, Mapping[str, Any]], Prepared]] = {
    "Equalize": _equalize,
    "Resize": _resize,
    "Pad": _pad,
}
"""By the name in the metadata's `pipeline`."""
