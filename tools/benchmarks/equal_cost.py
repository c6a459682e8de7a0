"""Accuracy over cost: the parts of the study of docs/frontier.md, each a command of its own.

equal_cost.py export CONFIG CHECKPOINT SIZE OUT.onnx           one detector for pages of SIZE pixels
equal_cost.py predict FILE.onnx ANNOTATIONS IMAGES OUT.json    its boxes, in COCO's form, and the seconds
equal_cost.py draws ANNOTATIONS RESULTS.json OUT.npz CLASSES   its mAP, and of pages drawn again
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MAX_DETECTIONS = 1000
"""Boxes of a class on a page that count; COCO's 100 is less than a page has noteheads."""
RESAMPLES = 1000


def sized(config: str, size: int) -> Any:
    """The config with pages of `size` pixels on their longest side."""
    from castling_det.config import load_config

    loaded = load_config(config)
    for loader in ("val_dataloader", "test_dataloader"):
        resize = next(step for step in loaded[loader].dataset.pipeline if step["type"] == "Resize")
        resize.scale = (size, size)
    return loaded


@cache
def multiply_adds(config: str, size: int, image: tuple[int, int]) -> float:
    """Of the whole detector on one page of `image` pixels (height, width) that is resized and padded, in 10^9."""
    from castling_det.config import network_shape
    from castling_det.report.complexity import detector_complexity

    loaded = sized(config, size)
    return detector_complexity(loaded, network_shape(loaded, image)).gmacs


def export(config: str, checkpoint: str, size: int, out: Path) -> None:
    """Writes the ONNX file, float32."""
    from castling_det.export.onnx import export_onnx

    print(export_onnx(sized(config, size), checkpoint, out).summary())


def predict(file: Path, annotations: Path, images: Path, out: Path, *, tile: int | None = None) -> None:
    """Writes the boxes that onnxruntime finds on every page, and the seconds of each."""
    from castling_det.files import write_json
    from castling_det.runtime.detector import Detector
    from castling_det.runtime.sources import read_image

    detector = Detector(file, tile=tile)
    document = json.loads(annotations.read_text(encoding="utf-8"))
    ids = {str(row["name"]): int(row["id"]) for row in document["categories"]}
    categories = tuple(ids[name] for name in detector.classes)
    results: list[dict[str, Any]] = []
    seconds = []
    for image in document["images"]:
        pixels = read_image(images / image["file_name"])
        start = time.perf_counter()
        detections = detector(pixels)
        seconds.append(round(time.perf_counter() - start, 4))
        results += detections.to_coco(image["id"], categories)
    write_json(out, results)
    write_json(out.with_suffix(".seconds.json"), seconds)


def draws(annotations: Path, results: Path, out: Path, classes: Sequence[str]) -> None:
    """Writes the mAP of all pages (first) and of `RESAMPLES` draws of pages, and the mAP50 of all."""
    from castling_det.files import atomic_write
    from castling_det.report.evaluation import Annotations, draw_images, evaluate_boxes, mean_average_precisions

    known = Annotations(annotations, classes=classes)
    found = known.results(results)
    drawn = draw_images(len(known.file_names), RESAMPLES, 0)
    values = mean_average_precisions(known.document, found, drawn, max_detections=MAX_DETECTIONS)
    map50 = evaluate_boxes(known.document, found, max_detections=MAX_DETECTIONS).metrics["mAP50"]
    with atomic_write(out) as part, part.open("wb") as stream:
        np.savez(stream, values=values, map50=map50 or np.nan)


def main(arguments: Sequence[str] | None = None) -> int:
    """One part; see above."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name == "export" and len(rest) == 4:
        export(rest[0], rest[1], int(rest[2]), Path(rest[3]))
    elif name == "predict" and len(rest) in (4, 5):
        predict(*map(Path, rest[:4]), tile=int(rest[4]) if rest[4:] else None)
    elif name == "draws" and len(rest) >= 4:
        draws(Path(rest[0]), Path(rest[1]), Path(rest[2]), rest[3:])
    else:
        print(__doc__)
        return int(name not in ("--help", "-h"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
