"""Where images come from: a file, a folder, a glob, a video. Each source says which of its images cannot be read."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from castling_det.runtime.detections import Image
from castling_det.runtime.image_size import declared_hw

__all__ = ["Frame", "ImageFiles", "UnreadableImage", "Video", "check_image", "open_source", "read_image"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl")
_VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_LOGGING: Any = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 has it in a module of its own
MAX_PIXELS = 100_000_000
"""Height x width of the largest image that is taken unless told otherwise: 300 MB in memory."""


class UnreadableImage(ValueError):
    """One image that cannot be taken; the others can."""


@dataclass(frozen=True)
class Frame:
    """One image of a source; where `image` is None, the problem in one sentence and how many images are missing."""

    name: str
    """The file's path below the source, or a video's frame such as `clip.mp4#000012`."""
    image: Image | None
    problem: str = ""
    missing: int = 0


def open_source(source: str, *, max_frames: int | None = None, max_pixels: int = MAX_PIXELS) -> ImageFiles | Video:
    """An image, a folder (not the folders in it), a glob (`**` goes into folders), or a video; else ValueError."""
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() in _VIDEO_SUFFIXES:
            return Video(path, max_frames=max_frames, max_pixels=max_pixels)
        return ImageFiles([path], max_pixels=max_pixels)
    suffixes = (*IMAGE_SUFFIXES, *_OTHER_IMAGES)
    if path.is_dir():
        candidates = list(path.iterdir())
        reason = f"no image in this folder (expected {', '.join(IMAGE_SUFFIXES)} files)"
    else:
        candidates = list(map(Path, glob.iglob(source, recursive=True)))
        reason = "no image matches" if glob.has_magic(source) else "no such file or folder"
    # Whatever has the name of an image is taken: what cannot be read is counted, not left out without a word.
    found = sorted(candidate for candidate in candidates if candidate.suffix.lower() in suffixes)
    if not found:
        raise ValueError(f"source {source}: {reason}; give an image, a folder, a glob in quotes or a video")
    return ImageFiles(found, max_pixels=max_pixels)


class ImageFiles:
    """Image files as a source."""

    def __init__(self, paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS) -> None:
        self.paths = list(paths)
        self.total = len(self.paths)
        self._max_pixels = max_pixels
        self._root = Path(os.path.commonpath([path.absolute().parent for path in self.paths]))

    def name_of(self, path: Path) -> str:
        """The path below the folder that all files share."""
        return path.absolute().relative_to(self._root).as_posix()

    def __iter__(self) -> Iterator[Frame]:
        for path in self.paths:
            try:
                if path.suffix.lower() in _OTHER_IMAGES:
                    raise UnreadableImage(f"{path}: {path.suffix} images are not read; convert it to PNG")
                yield Frame(self.name_of(path), read_image(path, max_pixels=self._max_pixels))
            except UnreadableImage as error:
                yield Frame(self.name_of(path), None, str(error), missing=1)


class Video:
    """The frames of a video file, at most `max_frames`, through supervision (`pip install castling-det[video]`).

    `info` is supervision's `VideoInfo`; `total` is the number of frames, None where the file does not say.
    """

    def __init__(self, path: Path, *, max_frames: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        # FFmpeg writes a page about a damaged file; ours is one line.
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
        try:
            import supervision
        except ImportError as error:
            raise ValueError(f"video {path}: needs supervision ({error}); pip install 'castling-det[video]'") from None
        try:
            self.info = supervision.VideoInfo.from_video_path(str(path))
        except Exception:  # supervision raises nothing more special
            problem = "not a video that OpenCV opens, or damaged; copy it again or convert it"
            raise ValueError(f"video {path}: {problem}") from None
        if not 0 < self.info.fps <= 1000:
            self.info.fps = 25.0
        self.paths = [path]
        known = [count for count in (self.info.total_frames or 0, max_frames or 0) if count > 0]
        self.total = min(known) if known else None
        self._max_frames, self._max_pixels = max_frames, max_pixels

    def __iter__(self) -> Iterator[Frame]:
        """Every frame; those that are missing at the end are one line that stands for all of them."""
        import supervision

        number, name = 0, self.paths[0].name
        for number, image in enumerate(supervision.get_video_frames_generator(str(self.paths[0])), start=1):
            if self._max_frames is not None and number > self._max_frames:
                return
            try:
                check_image(image, f"{name}#{number:06d}", max_pixels=self._max_pixels)
                yield Frame(f"{name}#{number:06d}", image)
            except UnreadableImage as error:
                yield Frame(f"{name}#{number:06d}", None, str(error), missing=1)
        missing = (self.total or 0) - number
        if missing > 0:
            problem = f"{name}: ends after {number} of {self.total} frames; the video is damaged or was cut short"
            yield Frame(f"{name}#{number + 1:06d}", None, problem, missing=missing)


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image:
    """A file as MMDetection loads it: three channels, 8 bits, BGR, turned as its EXIF says; else UnreadableImage."""
    path = Path(path)
    try:
        # A pipe or an endless device would be read for ever.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(f"{path}: not a file; give images only")
        if status.st_size > 8 * max_pixels + 2**24:  # four channels of 16 bits, and room for a thumbnail
            raise UnreadableImage(f"{path}: {status.st_size:,} bytes: more than an image of {max_pixels:,} pixels has")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be read ({error.strerror})") from None
    # A few kilobytes can unpack to gigabytes: the size in the header is checked before.
    try:
        declared = declared_hw(content)
    except ValueError as error:
        problem = f"not an image that OpenCV reads, or damaged ({error})"
        raise UnreadableImage(f"{path}: {problem}; copy it again or convert it to PNG") from None
    _check_size(declared, str(path), max_pixels)
    level = _LOGGING.getLogLevel()
    _LOGGING.setLogLevel(0)  # OpenCV prints lines about a damaged file; ours is the one that counts
    try:
        image = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        # OpenCV's own limit on pixels, or a header that promises more than the file has.
        image = None
    finally:
        _LOGGING.setLogLevel(level)
    if image is None:
        raise UnreadableImage(f"{path}: not an image that OpenCV reads, or damaged; copy it again or convert it to PNG")
    return check_image(image, str(path), max_pixels=max_pixels)


def check_image(image: object, name: str = "image", *, max_pixels: int = MAX_PIXELS) -> Image:
    """The image itself, if it is one: (height, width, 3) of uint8, BGR; else UnreadableImage."""
    if not isinstance(image, np.ndarray):
        raise UnreadableImage(
            f"{name}: {type(image).__name__}: expected a file or an array of uint8, (height, width, 3)"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        channels = image.shape[2] if image.ndim == 3 else f"none, its shape is {image.shape}"
        raise UnreadableImage(f"{name}: number of channels: {channels}; expected 3, in the order BGR (cv2.cvtColor)")
    if image.dtype != np.uint8:
        raise UnreadableImage(f"{name}: values of type {image.dtype}: expected uint8, 0 to 255; scale it")
    _check_size(image.shape[:2], name, max_pixels)
    return image


def _check_size(hw: tuple[int, ...], name: str, max_pixels: int) -> None:
    if not 0 < hw[0] * hw[1] <= max_pixels:
        raise UnreadableImage(
            f"{name}: {hw[0]} x {hw[1]} pixels: expected at least one and at most {max_pixels:,} in all; resize it or "
            "raise max_pixels (--max-pixels)"
        )
