"""From a source to files: predictions as COCO JSON, pictures with boxes, or a video with boxes."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from castling_det.runtime.detections import Image
from castling_det.runtime.detector import Detector
from castling_det.runtime.predictions import CocoPredictions, write_picture
from castling_det.runtime.preprocess import size_of
from castling_det.runtime.progress import progress_bar
from castling_det.runtime.sources import VIDEO_SUFFIXES, Frame, ImageFiles, find_images
from castling_det.runtime.video import Video, VideoFile

__all__ = ["EXIT_SKIPPED", "Outcome", "detect_source", "open_source"]

EXIT_SKIPPED = 10
_MOST_COUNTED = 100


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    images: int
    """Images or frames that were taken."""
    detections: int
    skipped: int
    """Images or frames that could not be read."""

    @property
    def exit_code(self) -> int:
        """0, or 10 + the number of skipped images, at most 110."""
        return EXIT_SKIPPED + min(self.skipped, _MOST_COUNTED) if self.skipped else 0


def open_source(source: str, *, max_frames: int | None = None, max_pixels: int) -> ImageFiles | Video:
    """A camera's number, a video file, an image, a folder or a glob.

    Raises:
        ValueError: there is no such thing.
    """
    if source.isdigit() and not Path(source).exists():
        return Video(int(source), max_frames=max_frames, max_pixels=max_pixels)
    if Path(source).suffix.lower() in VIDEO_SUFFIXES and Path(source).is_file():
        return Video(source, max_frames=max_frames, max_pixels=max_pixels)
    return ImageFiles(find_images(source), max_pixels=max_pixels)


def detect_source(
    detector: Detector, source: ImageFiles | Video, out: Path, *, draw: bool = True, annotations: Path | None = None
) -> Outcome:
    """Runs the detector over a source and writes `out/predictions.json`, `out/images.json` and pictures or a video.

    A frame that cannot be read is one line on stderr; where none can, nothing is written. Ctrl-C ends a camera as its
    last frame does.

    Raises:
        ValueError: annotations that do not fit.
        OSError: a file cannot be written, such as on a full disk; none is left half written.
    """
    predictions = CocoPredictions(detector.classes, annotations)
    images = skipped = detections = 0
    with ExitStack() as stack:
        advance = stack.enter_context(progress_bar(source.total))
        stack.enter_context(_interruptible(source))
        show = stack.enter_context(_Pictures(source, out)) if draw else None
        for batch in _batches(source, detector.batch_size):
            readable = []
            for frame in batch:
                if frame.image is None:
                    skipped += frame.missing
                    print(f"skipped: {frame.problem}", file=sys.stderr)
                else:
                    readable.append((frame.name, frame.image))
            for (name, image), found in zip(readable, detector.detect([image for _, image in readable]), strict=True):
                predictions.add(name, size_of(image), found)
                detections += len(found)
                images += 1
                if show is not None:
                    show.add(name, detector.draw(image, found))
            advance(sum(frame.missing or 1 for frame in batch))
    if images:
        predictions.write(out)
    return Outcome(images, detections, skipped)


class _Pictures(AbstractContextManager["_Pictures"]):
    """A picture for each image of files, one video for the frames of a video, opened with the first of them."""

    def __init__(self, source: ImageFiles | Video, out: Path) -> None:
        self._video = source if isinstance(source, Video) else None
        self._out = out
        self._file: VideoFile | None = None

    def add(self, name: str, picture: Image) -> None:
        if self._video is None:
            write_picture(self._out / "pictures" / name, picture)
            return
        if self._file is None:
            self._file = VideoFile(self._out / f"{Path(self._video.name).stem}_detections.mp4", self._video.fps)
        self._file.add(picture)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            whole = self._video is not None and self._video.is_camera and isinstance(error, KeyboardInterrupt)
            self._file.__exit__(*((None, None, None) if whole else (kind, error, trace)))


@contextmanager
def _interruptible(source: ImageFiles | Video) -> Iterator[None]:
    """Ctrl-C is how a camera ends."""
    try:
        yield
    except KeyboardInterrupt:
        if not (isinstance(source, Video) and source.is_camera):
            raise


def _batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    iterator = iter(frames)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
