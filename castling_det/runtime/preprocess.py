"""The pixels that MMDetection's test pipeline makes of an image, bit for bit, with numpy and OpenCV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import cv2
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from castling_det.runtime.detections import Image

__all__ = ["Equalize", "Pad", "Prepared", "Resize", "Side", "Step", "equalize", "padded_to_multiple", "prepare"]

Side = Annotated[int, Meta(ge=1, le=4096)]
"""Of a network's input, in pixels: 4096 x 4096 are 200 MB in float32."""
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
    content_hw: tuple[int, int]  # without the padding on the right and at the bottom
    original_hw: tuple[int, int]

    def to_original(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes (n, 4) in `pixels`, clipped to the content, in the original image's pixels."""
        (height, width), (original_height, original_width) = self.content_hw, self.original_hw
        limits = np.array([width, height, width, height], dtype=np.float32)
        back = np.array([1 / (width / original_width), 1 / (height / original_height)] * 2, dtype=np.float32)
        return np.clip(boxes, 0, limits) * back


class Equalize(Struct, frozen=True, tag=True):
    """Histogram equalisation of each channel."""

    def __call__(self, prepared: Prepared) -> Prepared:
        """The next state of the image."""
        return replace(prepared, pixels=equalize(prepared.pixels))


class Resize(Struct, frozen=True, tag=True):
    """A resize to `scale` (height, width), or to fit into it."""

    scale: tuple[Side, Side]
    keep_ratio: bool
    interpolation: Literal["nearest", "bilinear", "bicubic", "area", "lanczos"]

    def __call__(self, prepared: Prepared) -> Prepared:
        """The next state of the image."""
        (height, width), hw = self.scale, prepared.pixels.shape[:2]
        if self.keep_ratio:
            factor = min(max(self.scale) / max(hw), min(self.scale) / min(hw))
            # At least one pixel: MMDetection fails on an image so narrow that nothing is left of it.
            height, width = (max(int(side * factor + 0.5), 1) for side in hw)
        pixels = cv2.resize(prepared.pixels, (width, height), interpolation=_INTERPOLATIONS[self.interpolation])
        return replace(prepared, pixels=pixels.astype(np.uint8, copy=False), content_hw=(height, width))


class Pad(Struct, frozen=True, tag=True):
    """Padding on the right and at the bottom to at least `size` (height, width)."""

    size: tuple[Side, Side]
    pad_values: tuple[float, float, float]

    def __call__(self, prepared: Prepared) -> Prepared:
        """The next state of the image."""
        height, width = prepared.pixels.shape[:2]
        bottom, right = max(self.size[0] - height, 0), max(self.size[1] - width, 0)
        pixels = cv2.copyMakeBorder(prepared.pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=self.pad_values)
        return replace(prepared, pixels=pixels.astype(np.uint8, copy=False))


Step = Equalize | Resize | Pad
"""One step of a pipeline; in the file's metadata `type` has its name."""


def prepare(image: Image, pipeline: Sequence[Step]) -> Prepared:
    """Applies the pipeline of an ONNX file."""
    hw = (image.shape[0], image.shape[1])
    prepared = Prepared(image, hw, hw)
    for step in pipeline:
        prepared = step(prepared)
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


def padded_to_multiple(hw: tuple[int, ...], divisor: int) -> tuple[int, int]:
    """The smallest multiples of `divisor` that hold `hw`."""
    return -(-hw[0] // divisor) * divisor, -(-hw[1] // divisor) * divisor
