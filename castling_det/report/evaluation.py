"""COCO's box evaluation of a results file: average precisions, and precision over recall by category.

Through faster-coco-eval where it is installed, else through pycocotools. Both give the same figures.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np

from castling_det.report.record import METRICS

__all__ = ["BACKENDS", "Evaluation", "evaluate_boxes", "evaluator_of", "load_truth"]

BACKENDS = ("faster-coco-eval", "pycocotools")
"""In the order of preference."""

_IOU50 = 0


@dataclass(frozen=True)
class Evaluation:
    """Figures of one results file. `metrics` has `METRICS`, None where no annotation has the size.

    `precision` is that at recall 0, 0.01, ..., 1 with IoU 0.50, by name of the category; those without annotations are
    left out. `backend` says what evaluated, with its version.
    """

    metrics: dict[str, float | None]
    precision: dict[str, tuple[float, ...]]
    backend: str


def evaluate_boxes(
    document: dict[str, Any], results: list[dict[str, Any]], *, backend: str | None = None
) -> Evaluation:
    """Evaluates boxes on all images and categories of the annotations.

    Args:
        document: COCO annotations.
        results: boxes of a COCO results file; none at all is a detector that scores zero.
        backend: one of `BACKENDS`; None takes the first that is installed.

    Raises:
        ValueError: an unknown backend, or none that is installed.
    """
    backend = _chosen(backend)
    evaluator = evaluator_of(load_truth(document, backend), results, backend)
    with redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    figures = (float(value) for value in evaluator.stats[: len(METRICS)])
    # IoU thresholds, recalls, categories, areas, largest numbers of detections: all areas, 100 detections.
    curves = np.asarray(evaluator.eval["precision"])[_IOU50, :, :, 0, -1]
    names = {item["id"]: str(item["name"]) for item in document["categories"]}
    return Evaluation(
        metrics={name: value if value >= 0 else None for name, value in zip(METRICS, figures, strict=True)},
        precision={
            names[category]: tuple(round(float(value), 4) for value in curves[:, index])
            for index, category in enumerate(evaluator.params.catIds)
            if curves[0, index] >= 0
        },
        backend=f"{backend} {version(backend)}",
    )


def load_truth(document: dict[str, Any], backend: str = "pycocotools") -> Any:
    """The annotations as the backend's `COCO`; the document itself is left as it is."""
    coco = _classes(backend)[0]()
    rows = [{"iscrowd": 0, **row} for row in document["annotations"]]
    coco.dataset = {"info": {}, **document, "annotations": [{"area": _area(row), **row} for row in rows]}
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def evaluator_of(truth: Any, results: list[dict[str, Any]], backend: str = "pycocotools") -> Any:
    """The backend's `COCOeval` of boxes, not yet run."""
    coco_class, evaluator_class = _classes(backend)
    found = coco_class()
    boxes = [
        {**{key: row[key] for key in ("image_id", "category_id", "bbox", "score")}, "id": index, "iscrowd": 0,
         "area": _area(row)}
        for index, row in enumerate(results, start=1)
    ]  # fmt: skip
    found.dataset = {**truth.dataset, "annotations": boxes}
    with redirect_stdout(io.StringIO()):
        found.createIndex()
        return evaluator_class(truth, found, "bbox")


def _area(row: dict[str, Any]) -> float:
    """Of a box; COCO's own figure, that of the mask, stands where the annotations give it."""
    return float(row["bbox"][2]) * float(row["bbox"][3])


def _chosen(backend: str | None) -> str:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    installed = [name for name in BACKENDS if find_spec(name.replace("-", "_")) is not None]
    wanted = [name for name in installed if backend in (None, name)]
    if not wanted:
        raise ValueError(f"{backend or ' and '.join(BACKENDS)}: not installed; pip install {backend or 'pycocotools'}")
    return wanted[0]


def _classes(backend: str) -> tuple[Any, Any]:
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    return FasterCOCO, COCOeval_faster
