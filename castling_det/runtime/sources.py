"""Where images come from: a file, a folder, a glob. Each is read in its turn; one that cannot be read is said."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from castling_det.runtime.detections import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "VIDEO_SUFFIXES",
    "Frame",
    "ImageFiles",
    "Source",
    "UnreadableImage",
    "check_image",
    "find_images",
    "read_image",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
MAX_PIXELS = 100_000_000
"""Height x width of the largest image that is taken unless told otherwise: 300 MB in memory."""


class UnreadableImage(ValueError):
    """One image that cannot be taken; the others can."""


@dataclass(frozen=True)
class Frame:
    """One image of a source, or why there is none."""

    name: str
    """The file's path below the source, or a video's frame such as `clip.mp4#000012`."""
    image: Image | None
    problem: str = ""
    """One sentence where `image` is None."""
    missing: int = 0
    """Images that the problem stands for, at least 1 where `image` is None."""


class Source(Protocol):
    """Images, one after the other."""

    def __iter__(self) -> Iterator[Frame]: ...

    @property
    def total(self) -> int | None:
        """Number of images, None where it is not known."""


def check_image(image: object, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> Image:
    """The image itself, if it is one: (height, width, 3) of uint8, BGR.

    Raises:
        UnreadableImage: another type, number of channels or size.
    """
    if not isinstance(image, np.ndarray):
        raise UnreadableImage(
            f"{name}: {type(image).__name__}: expected a file or an array (height, width, 3) of uint8"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        channels = image.shape[2] if image.ndim == 3 else f"none, its shape is {image.shape}"
        raise UnreadableImage(
            f"{name}: number of channels: {channels}; expected 3, (height, width, 3) in the order BGR; convert it, "
            "such as with cv2.cvtColor"
        )
    if image.dtype != np.uint8:
        raise UnreadableImage(f"{name}: values of type {image.dtype}: expected uint8, 0 to 255; scale it")
    height, width = image.shape[:2]
    if not 0 < height * width <= max_pixels:
        raise UnreadableImage(
            f"{name}: {height} x {width} pixels: expected at least one and at most {max_pixels:,} in all; resize it or "
            "raise max_pixels (--max-pixels)"
        )
    return image


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image:
    """A file as MMDetection loads it: three channels, 8 bits, BGR, turned as its EXIF says.

    Raises:
        UnreadableImage: no such file, no image, or one that is too large; names it.
    """
    path = Path(path)
    try:
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from None
    try:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except cv2.error:
        # OpenCV's own limit on pixels, or a header that promises what the file does not have.
        image = None
    if image is None:
        raise UnreadableImage(f"{path}: not an image that OpenCV reads, or damaged; copy it again or convert it to PNG")
    return check_image(image, str(path), max_pixels=max_pixels)


def find_images(source: str) -> list[Path]:
    """The image files of a file, a folder (not of those below it) or a glob (`**` goes below), sorted.

    Raises:
        ValueError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(filter(_is_image, path.iterdir()))
        what = f"no image in this folder (expected {', '.join(IMAGE_SUFFIXES)} files)"
    else:
        found = sorted(filter(_is_image, map(Path, glob.glob(source, recursive=True))))
        what = "no image matches" if glob.has_magic(source) else "no such file or folder"
    if not found:
        raise ValueError(
            f"source {source}: {what}; give an image, a folder, a glob in quotes, a video or a camera's number"
        )
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


class ImageFiles:
    """Image files as a source."""

    def __init__(self, paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS) -> None:
        self.paths = list(paths)
        self.max_pixels = max_pixels
        folders = [str(path.absolute().parent) for path in self.paths]
        self._root = Path(os.path.commonpath(folders))

    @property
    def total(self) -> int:
        """Number of files."""
        return len(self.paths)

    def __iter__(self) -> Iterator[Frame]:
        for path in self.paths:
            name = path.absolute().relative_to(self._root).as_posix()
            try:
                yield Frame(name, read_image(path, max_pixels=self.max_pixels))
            except UnreadableImage as error:
                yield Frame(name, None, str(error), missing=1)
