"""Videos and cameras, read and written with OpenCV."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import cv2

from castling_det.files import atomic_write
from castling_det.runtime.detections import Image
from castling_det.runtime.sources import MAX_PIXELS, Frame, UnreadableImage, check_image

__all__ = ["Video", "VideoFile"]

_DEFAULT_FPS = 25.0
_HIGHEST_FPS = 1000.0


class Video:
    """A video file, or the camera of a number, as a source.

    Args:
        source: path, or number of the camera.
        max_frames: stop after so many; None reads a file to its end, a camera until it is interrupted.
        max_pixels: of a frame.

    Raises:
        ValueError: not a video that OpenCV opens, or no such camera.
    """

    def __init__(self, source: str | int, *, max_frames: int | None = None, max_pixels: int = MAX_PIXELS) -> None:
        # OpenCV and FFmpeg write a page about a missing camera or a damaged file; ours is one line.
        _silence()
        self.is_camera = isinstance(source, int)
        self.name = f"camera{source}" if isinstance(source, int) else Path(source).name
        self._capture = cv2.VideoCapture(source)
        if not self._capture.isOpened():
            if self.is_camera:
                raise ValueError(
                    f"camera {source}: cannot be opened; check that it is connected and its number, from 0"
                )
            raise ValueError(f"video {source}: not a video that OpenCV opens, or damaged; copy it again or convert it")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= _HIGHEST_FPS else _DEFAULT_FPS  # cameras that do not know say 0, -1 or thousands
        frames = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self._frames = None if self.is_camera or frames <= 0 else frames
        self._max_frames = max_frames
        self._max_pixels = max_pixels

    @property
    def total(self) -> int | None:
        """Frames that the file says it has, or that were asked for."""
        known = [count for count in (self._frames, self._max_frames) if count is not None]
        return min(known) if known else None

    def __iter__(self) -> Iterator[Frame]:
        """Every frame; a run of frames that cannot be read is one line that stands for all of them."""
        number = missing_from = 0
        try:
            while self.total is None or number < self.total:
                is_read, image = self._capture.read()
                if not is_read and self._frames is None:
                    break  # a camera that was unplugged, or the end of a stream that has no length
                number += 1
                if not is_read:
                    missing_from = missing_from or number
                    continue
                if missing_from:
                    yield self._missing(missing_from, number - 1)
                    missing_from = 0
                yield self._checked(number, image)
            if missing_from:
                yield self._missing(missing_from, number)
        finally:
            self._capture.release()

    def _checked(self, number: int, image: object) -> Frame:
        name = self._frame_name(number)
        try:
            return Frame(name, check_image(image, name, max_pixels=self._max_pixels))
        except UnreadableImage as error:
            return Frame(name, None, str(error), missing=1)

    def _missing(self, first: int, last: int) -> Frame:
        which = f"frame {first}" if first == last else f"frames {first} to {last}"
        problem = f"{self.name}: {which} of {self.total} cannot be read, the video is damaged or ends early"
        return Frame(self._frame_name(first), None, problem, missing=last - first + 1)

    def _frame_name(self, number: int) -> str:
        return f"{self.name}#{number:06d}"


class VideoFile(AbstractContextManager["VideoFile"]):
    """An MP4 file that is whole or absent; its size is the first frame's.

    Raises:
        OSError: it cannot be written, such as on a full disk; OpenCV itself would say nothing.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float) -> None:
        self.path = Path(path)
        self.fps = fps
        self._atomic = atomic_write(self.path, suffix=".part.mp4")
        self._temporary = self._atomic.__enter__()
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)
        self._frames = 0

    def add(self, image: Image) -> None:
        """Appends a frame; one of another size than the first is resized to it."""
        height, width = image.shape[:2]
        if self._writer is None:
            self._size = (width, height)
            self._writer = cv2.VideoWriter(str(self._temporary), cv2.VideoWriter.fourcc(*"mp4v"), self.fps, self._size)
            if not self._writer.isOpened():
                raise self._failed("OpenCV cannot write MP4 there")
        if (width, height) != self._size:
            image = cv2.resize(image, self._size)  # type: ignore[assignment]
        self._writer.write(image)
        self._frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        if error is None and self._frames != (written := _frames_in(self._temporary)):
            # Thrown into the context, so that the part is removed.
            error = self._failed(f"{written} of {self._frames} frames are in it, the disk may be full")
            self._atomic.__exit__(type(error), error, None)
            raise error
        self._atomic.__exit__(kind, error, trace)

    def _failed(self, reason: str) -> OSError:
        return OSError(errno.EIO, f"video cannot be written ({reason}); an older one is as it was", str(self.path))


def _silence() -> None:
    logging = getattr(cv2.utils, "logging", None)
    set_level = cv2.setLogLevel if logging is None else logging.setLogLevel  # OpenCV 4 and 5
    set_level(0)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def _frames_in(path: Path) -> int:
    # The count stands at the end of an MP4 file: one that was cut short has none.
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    return count
