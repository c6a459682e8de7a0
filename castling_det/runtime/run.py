"""From a source to files: COCO predictions, and pictures or a video with boxes; each is whole or absent."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from castling_det.files import atomic_write
from castling_det.runtime.detections import Detections, Image
from castling_det.runtime.detector import Detector
from castling_det.runtime.sources import IMAGE_SUFFIXES, Frame, ImageFiles, UnreadableImage, Video

__all__ = ["EXIT_SKIPPED", "CocoPredictions", "Outcome", "detect_source"]

EXIT_SKIPPED = 10
_PREDICTIONS, _IMAGES = "predictions.json", "images.json"


@dataclass(frozen=True)
class Outcome:
    """What a run did; images are those that were taken, skipped are those that could not be read."""

    images: int
    detections: int
    skipped: int

    @property
    def exit_code(self) -> int:
        """0, or 10 + the number of skipped images, at most 110."""
        return EXIT_SKIPPED + min(self.skipped, 100) if self.skipped else 0


def detect_source(
    detector: Detector,
    source: ImageFiles | Video,
    out: Path,
    *,
    draw: bool = True,
    draw_thr: float = 0.3,
    annotations: Path | None = None,
) -> Outcome:
    """Runs the detector over a source and writes `out/predictions.json`, `out/images.json` and pictures or a video.

    Predictions hold every detection, pictures those whose score is at least `draw_thr`.

    An image that cannot be read is one line on stderr; where none can, nothing is written. No file is half written.
    ValueError: annotations that do not fit, or an output that would replace an input.
    """
    _check_outputs(source, out, draw, annotations)
    predictions = CocoPredictions(detector.classes, annotations)
    skipped = detections = 0
    with ExitStack() as stack:
        sink = stack.enter_context(_video_sink(source, out)) if draw and isinstance(source, Video) else None
        frames = iter(_tracked(source))
        while batch := list(itertools.islice(frames, detector.batch_size)):
            for frame, found in _detected(detector, batch):
                if frame.image is None or found is None:
                    skipped += frame.missing
                    print(f"skipped: {frame.problem}", file=sys.stderr)
                    continue
                predictions.add(frame.name, frame.image.shape[:2], found)
                detections += len(found)
                if draw and sink is None:
                    _write_picture(_picture_path(out, frame.name), detector.draw(frame.image, found.above(draw_thr)))
                elif sink is not None:
                    sink.write_frame(detector.draw(frame.image, found.above(draw_thr)))
        if sink is not None and not predictions.images:
            raise ValueError(f"video {source.paths[0]}: no frame of it can be read; nothing is written")
    if predictions.images:
        predictions.write(out)
    return Outcome(len(predictions.images), detections, skipped)


class CocoPredictions:
    """Gathers detections and writes them as COCO results, with the images and categories that they are about.

    Ids are those of `annotations`, an existing COCO file; without one, images and categories count from 1.
    """

    def __init__(self, classes: tuple[str, ...], annotations: str | os.PathLike[str] | None = None) -> None:
        self.classes = classes
        self.images: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []
        self._known: dict[str, int] | None = None
        self.category_ids = tuple(range(1, len(classes) + 1))
        if annotations is not None:
            self._known, categories = _read_ids(Path(annotations))
            if missing := [name for name in classes if name not in categories]:
                problem = f"no category {', '.join(missing)}, which the detector knows; it has {', '.join(categories)}"
                raise ValueError(f"annotations {annotations}: {problem}")
            self.category_ids = tuple(categories[name] for name in classes)

    def add(self, name: str, hw: tuple[int, ...], detections: Detections) -> None:
        """One image's detections; ValueError: the annotations have no image of this name."""
        image_id = len(self.images) + 1 if self._known is None else self._known.get(Path(name).name)
        if image_id is None:
            raise ValueError(f"{name}: no image of this file_name in the annotations; run on their images only")
        self.images.append({"id": image_id, "file_name": name, "height": hw[0], "width": hw[1]})
        self._entries += detections.to_coco(image_id, self.category_ids)

    def write(self, folder: Path) -> None:
        """`predictions.json` (a list, as `COCO.loadRes` reads it) and `images.json` (its images and categories)."""
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        described = {"images": self.images, "annotations": [], "categories": categories}
        # Both contents are on disk before either file takes its name.
        with atomic_write(folder / _IMAGES) as images_part, atomic_write(folder / _PREDICTIONS) as predictions_part:
            # In ASCII: a file's name need not be text, and its bytes come back from the escapes.
            images_part.write_text(json.dumps(described) + "\n", encoding="utf-8")
            predictions_part.write_text(json.dumps(self._entries, allow_nan=False) + "\n", encoding="utf-8")


def _read_ids(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Image ids by file name (without folders) and category ids by name."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        images = {Path(image["file_name"]).name: int(image["id"]) for image in document["images"]}
        categories = {str(category["name"]): int(category["id"]) for category in document["categories"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"annotations {path}: not a readable COCO file ({type(error).__name__}: {error})") from None
    if len(images) < len(document["images"]):
        raise ValueError(f"annotations {path}: two images have one file_name; rename one")
    return images, categories


def _check_outputs(source: ImageFiles | Video, out: Path, draw: bool, annotations: Path | None) -> None:
    """Refuses, before anything is decoded, outputs that would replace an input, under whatever name or link."""
    taken = [*source.paths, *([annotations] if annotations else [])]
    inputs = {identity: path for path in taken for identity in _identities(path)}
    for path in [out / _PREDICTIONS, out / _IMAGES, *(_drawn_paths(source, out) if draw else [])]:
        for identity in _identities(path):
            if identity in inputs:
                raise ValueError(f"--out {out}: {path} would replace the input {inputs[identity]}; give another folder")


def _identities(path: Path) -> Iterator[tuple[int, int]]:
    """Of the file, and of the link where it is one; none of a file that does not exist."""
    for read in (os.lstat, os.stat):
        with suppress(OSError):
            status = read(path)
            yield status.st_dev, status.st_ino


def _detected(detector: Detector, batch: list[Frame]) -> list[tuple[Frame, Detections | None]]:
    """Each frame with its detections, or with None where it has no image or one that the detector cannot take."""
    images = [frame.image for frame in batch if frame.image is not None]
    try:
        results = iter(detector.detect(images))
    except UnreadableImage as error:
        if len(batch) == 1:
            return [(Frame(batch[0].name, None, f"{batch[0].name}: {error}", missing=1), None)]
        return [pair for frame in batch for pair in _detected(detector, [frame])]
    return [(frame, None if frame.image is None else next(results)) for frame in batch]


def _picture_path(out: Path, name: str) -> Path:
    """In the format of the name's suffix, PNG for one that is not an image's."""
    path = out / "pictures" / name
    return path if path.suffix.lower() in IMAGE_SUFFIXES else path.with_name(f"{path.name}.png")


def _write_picture(path: Path, picture: Image) -> None:
    done, content = cv2.imencode(path.suffix, picture)
    if not done:
        raise OSError(None, "OpenCV cannot encode the picture", str(path))
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.tobytes())


def _drawn_paths(source: ImageFiles | Video, out: Path) -> list[Path]:
    if isinstance(source, Video):
        return [out / f"{source.paths[0].stem[:50]}_detections.mp4"]
    return [_picture_path(out, source.name_of(path)) for path in source.paths]


@contextmanager
def _video_sink(source: Video, out: Path) -> Iterator[Any]:
    import supervision

    (path,) = _drawn_paths(source, out)
    with atomic_write(path, suffix=".part.mp4") as part, ExitStack() as stack:
        try:
            sink = stack.enter_context(supervision.VideoSink(str(part), source.info))
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error
        yield sink


def _tracked(source: ImageFiles | Video) -> Iterable[Frame]:
    """The frames, with a progress bar on a terminal where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return source
    console = Console(stderr=True)
    return track(source, "images", total=source.total, console=console, transient=True, disable=not console.is_terminal)
