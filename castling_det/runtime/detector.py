"""A trained detector in three lines: an exported ONNX file, or a PyTorch checkpoint with its config."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from castling_det.files import sha256_of
from castling_det.runtime.detections import Backend, Detections, Image
from castling_det.runtime.draw import draw_detections
from castling_det.runtime.sources import MAX_PIXELS, check_image, read_image

__all__ = ["WEIGHTS", "Detector", "shipped"]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
"""Detectors that come with the package, each an ONNX file beside its card."""

Source = str | os.PathLike[str] | Image
"""A file, or an array (height, width, 3) of uint8 in the order BGR, as OpenCV has it."""


class Detector:
    """Finds objects in images.

        detector = castling_det.Detector("scores-nano")
        detections = detector("page.png")
        print(detections)

    An ONNX file needs neither PyTorch nor MMDetection (`pip install castling-det[runtime]`).

    Args:
        model: ONNX file of `tools/export_onnx.py`, a checkpoint `.pth`, or the name of a detector that is shipped.
        config: of the checkpoint, a file or `castling_det::...`; an ONNX file needs none.
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.
        score_thr: detections below it are left out, beside what the model itself leaves out.
        batch_size: images, or tiles of one, that go through the network at once.
        tile: side in pixels of the square tiles of larger images, through SAHI; None: every image whole.
        overlap: of neighbouring tiles, a fraction of `tile` in [0, 1).
        max_pixels: height x width of the largest image that is taken.

    Attributes:
        classes: names by label.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        *,
        device: str = "cpu",
        score_thr: float = 0.0,
        batch_size: int = 1,
        tile: int | None = None,
        overlap: float = 0.2,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        for name, value, fits, expected in (
            ("score_thr", score_thr, 0 <= score_thr <= 1, "a score in [0, 1]"),
            ("batch_size", batch_size, batch_size >= 1, "at least 1"),
            ("tile", tile, tile is None or tile >= 16, "at least 16 pixels, or None for whole images"),
            ("overlap", overlap, 0 <= overlap < 1, "a fraction of the tile in [0, 1), such as 0.2"),
        ):
            if not fits:
                raise ValueError(f"{name}={value}: expected {expected}")
        self.score_thr, self.batch_size, self.max_pixels = score_thr, batch_size, max_pixels
        self.tile, self.overlap = tile, overlap
        if tile is not None:
            _tiling()
        self.backend = _load(model, config, device)
        self.classes = self.backend.classes

    def __call__(self, image: Source) -> Detections:
        """The detections in one image; ValueError: not an image of three channels, or more than `max_pixels`."""
        return self.detect([image])[0]

    def detect(self, images: Sequence[Source]) -> list[Detections]:
        """As a call for each image, `batch_size` at once. Errors as there; the first one stops."""
        loaded = [self._loaded(image) for image in images]
        whole = [index for index, image in enumerate(loaded) if self.tile is None or max(image.shape[:2]) <= self.tile]
        found: dict[int, Detections] = {}
        for start in range(0, len(whole), self.batch_size):
            batch = whole[start : start + self.batch_size]
            found |= zip(batch, self.backend.detect([loaded[index] for index in batch]), strict=True)
        tiling = {"tile": self.tile, "overlap": self.overlap, "batch_size": self.batch_size}
        for index in sorted(set(range(len(loaded))) - set(whole)):
            found[index] = _tiling()(self.backend, loaded[index], **tiling)
        return [found[index].inside(image.shape).above(self.score_thr) for index, image in enumerate(loaded)]

    def draw(self, image: Source, detections: Detections) -> Image:
        """A copy of the image with the detections on it, by MMDetection's visualizer where the model is its own."""
        draw = getattr(self.backend, "draw", draw_detections)
        return draw(self._loaded(image), detections)

    def _loaded(self, image: Source) -> Image:
        if isinstance(image, (str, os.PathLike)):
            return read_image(image, max_pixels=self.max_pixels)
        return check_image(image, max_pixels=self.max_pixels)


def shipped(name: str) -> Path:
    """The ONNX file of a detector that comes with the package; ValueError for another name or a file that changed."""
    path = WEIGHTS / f"{name}.onnx"
    if not path.is_file():
        names = " or ".join(["an .onnx file", *sorted(file.stem for file in WEIGHTS.glob("*.onnx"))])
        raise ValueError(f"model {name}: no such file, and no detector of ours; expected {names}")
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    if sha256_of(path) != card["sha256"]:
        raise ValueError(f"model {path}: another file than its card {path.stem}.json describes; reinstall castling-det")
    return path


def _load(model: str | os.PathLike[str], config: str | os.PathLike[str] | None, device: str) -> Backend:
    path = Path(model)
    if not path.suffix and not path.exists():
        path = shipped(str(model))
    if path.suffix == ".onnx":
        if config is not None:
            raise ValueError(f"config {config}: {path} is an ONNX file, which needs none")
        from castling_det.runtime.onnx_detector import OnnxDetector

        return OnnxDetector(path, device=device)
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"model {path}: expected an .onnx file or a checkpoint .pth")
    if not path.is_file():
        raise ValueError(f"model {path}: no such file")
    if config is None:
        raise ValueError(f"model {path}: a checkpoint needs its config; give it (--config), or export an .onnx file")
    try:
        from castling_det.runtime.torch_detector import TorchDetector
    except ImportError as error:
        problem = f"a checkpoint needs PyTorch and MMDetection ({error}); pip install 'castling-det[onedl]'"
        raise ValueError(f"model {path}: {problem}, or export an .onnx file") from None
    return TorchDetector(path, config, device=device)


def _tiling() -> Any:
    try:
        from castling_det.runtime.tiled import detect_tiled
    except ImportError as error:
        raise ValueError(f"tile: needs SAHI ({error}); pip install 'castling-det[sahi]'") from None
    return detect_tiled
