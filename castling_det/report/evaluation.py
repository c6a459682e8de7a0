"""COCO's evaluation of boxes by faster-coco-eval: average precisions, precision over recall, which boxes are right.

How sure a difference of mAP is: images are drawn again with replacement, both detectors on the same draws. Detections
are matched once. A draw only accumulates each image's matches as often as the image was drawn, in faster-coco-eval's
own code, and so gives the mAP that evaluating the drawn set would give.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from typing_extensions import NotRequired, TypedDict

from castling_det.report.records import METRICS, Counts, read_json

CONFIDENCE = 0.95
"""Confidence of every interval."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Id = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
Pixels = Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
Box = tuple[Pixels, Pixels, Pixels, Pixels]
"""x, y, width, height, as in COCO's files."""


# What is read of COCO's files. Without `area`, the box's own counts; boxes with `iscrowd` are neither found nor missed.
class _Image(TypedDict):
    id: Id
    file_name: str
    height: NotRequired[float | None]
    width: NotRequired[float | None]


class _Annotation(TypedDict):
    image_id: Id
    category_id: Id
    bbox: Box
    area: NotRequired[Pixels | None]
    iscrowd: NotRequired[int | bool | None]


class _Category(TypedDict):
    id: Id
    name: str


class _Document(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _Result(TypedDict):
    image_id: Id
    category_id: Id
    bbox: Box
    score: float


class Annotations:
    """A COCO annotation file, `description` its name in a report. ValueError names the file and the wrong field.

    `classes` are the categories that were trained, as `metainfo` of a config names them; None: all. Boxes of other
    categories do not count, as in MMDetection's CocoMetric.
    """

    def __init__(self, path: Path, *, description: str | None = None, classes: Collection[str] | None = None) -> None:
        self.path = path
        self.document = read_json(path, _Document, "a COCO annotation file")
        if classes is not None:
            kept = [row for row in self.document["categories"] if row["name"] in classes]
            ids = {row["id"] for row in kept}
            boxes = [row for row in self.document["annotations"] if row["category_id"] in ids]
            self.document = _Document(images=self.document["images"], categories=kept, annotations=boxes)
        """The file's content, not to be changed."""
        images, boxes = self.document["images"], self.document["annotations"]
        self._ids = {
            "image": {row["id"] for row in images},
            "category": {row["id"] for row in self.document["categories"]},
        }
        for kind, rows in (("image", images), ("category", self.document["categories"])):
            if len(rows) > len(self._ids[kind]):
                raise ValueError(f"{path}: an {kind} id is there twice; give each {kind} an id of its own")
        self._check(path, boxes, "add what is missing, or leave these boxes out")
        self.file_names = {image["id"]: image["file_name"] for image in images}
        sizes = ((int(image.get("height") or 0), int(image.get("width") or 0)) for image in images)
        known = Counter(size for size in sizes if min(size) > 0)
        self.image_shape = known.most_common(1)[0][0] if known else None
        """Height and width that most images have, in pixels; None if the file does not say."""
        count = sum(not row.get("iscrowd") for row in boxes)
        self.description = description or f"{path}: {len(images)} images, {count} boxes"

    def results(self, path: Path) -> list[_Result]:
        """The boxes of a COCO results file, on images and of categories of this file; else ValueError."""
        rows = read_json(path, list[_Result], "a COCO results file, a list of boxes")
        self._check(path, rows, "give the annotation file that was tested on")
        return rows

    def _check(self, path: Path, rows: Sequence[Any], fix: str) -> None:
        for kind, known in self._ids.items():
            if unknown := sorted({row[f"{kind}_id"] for row in rows} - known):
                raise ValueError(f"{path}: {kind} ids {unknown[:5]} are not in {self.path}; {fix}")


class Evaluation(NamedTuple):
    """Figures of one results file."""

    metrics: dict[str, float | None]
    """`METRICS`, None where no annotation has the size."""
    precision: dict[str, tuple[float, ...]]
    """At recall 0, 0.01, ..., 1 with IoU 0.50, by name of each category that has annotations."""


def evaluate_boxes(document: Any, results: Sequence[Any], *, max_detections: int = 100) -> Evaluation:
    """Evaluates boxes of a COCO results file on all images and categories of COCO annotations.

    `max_detections`: boxes with the highest scores that count in each category of an image.
    """
    evaluator = evaluator_of(document, results)
    evaluator.params.maxDets = [max_detections]
    evaluator.run()
    metrics = dict(zip(METRICS, map(float, evaluator.stats), strict=False))
    # IoU thresholds, recalls, categories, areas, `maxDets`: IoU 0.50, all areas, the one number of detections.
    curves = np.asarray(evaluator.eval["precision"])[0, :, :, 0, -1]
    names = {row["id"]: str(row["name"]) for row in document["categories"]}
    return Evaluation(
        {name: value if value >= 0 else None for name, value in metrics.items()},
        {
            names[int(category)]: tuple(round(float(value), 4) for value in curve)
            for category, curve in zip(evaluator.params.catIds, curves.T, strict=True)
            if curve[0] >= 0
        },
    )


def evaluator_of(document: Any, results: Sequence[Any], **options: Any) -> Any:
    """faster-coco-eval's `COCOeval_faster` of boxes, not yet run; document and results stay as they are.

    Annotations and results are numbered anew from 1: for COCO's evaluation, the id 0 means "not matched".
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def numbered(rows: Sequence[Any]) -> Any:
        boxes = []
        for number, row in enumerate(rows, start=1):
            area = row["bbox"][2] * row["bbox"][3] if row.get("area") is None else row["area"]
            own = {"id": number, "area": float(area), "iscrowd": int(bool(row.get("iscrowd"))), "bbox": [*row["bbox"]]}
            boxes.append({**row, **own})
        return COCO({"images": document["images"], "categories": document["categories"], "annotations": boxes})

    return COCOeval_faster(numbered(document["annotations"]), numbered(results), "bbox", **options)


@dataclass(frozen=True)
class Found:
    """The boxes of one image, by what became of them. Detections inside of a crowd are in none of the lists."""

    right: list[Box] = field(default_factory=list)
    wrong: list[Box] = field(default_factory=list)
    missed: list[Box] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        """How many there are of each."""
        return Counts(tp=len(self.right), fp=len(self.wrong), fn=len(self.missed))


def match_boxes(document: Any, results: Sequence[Any], *, score: float, iou: float) -> dict[int, Found]:
    """Which boxes with a score of at least `score` are right, by image id, as COCO's evaluation matches at one IoU."""
    kept = [row for row in results if row["score"] >= score]
    evaluator = evaluator_of(document, kept)
    params = evaluator.params
    params.iouThrs, params.areaRng, params.areaRngLbl = np.array([iou]), [[0, float("inf")]], ["all"]
    params.maxDets = [max(len(kept), 1)]
    evaluator.evaluate()
    pairs = (pair.split("_") for pair in evaluator.eval["matched"])  # "DETECTION_ANNOTATION", as numbered
    truth_of = {int(number): int(truth) for number, truth in pairs}
    taken = set(truth_of.values())
    found: dict[int, Found] = defaultdict(Found)
    for number, row in enumerate(document["annotations"], start=1):
        if number not in taken and not row.get("iscrowd"):
            found[row["image_id"]].missed.append(row["bbox"])
    for number, row in enumerate(kept, start=1):
        if number not in truth_of:
            found[row["image_id"]].wrong.append(row["bbox"])
        elif not document["annotations"][truth_of[number] - 1].get("iscrowd"):
            found[row["image_id"]].right.append(row["bbox"])
    return found


def mean_average_precisions(
    document: Any, results: Sequence[Any], draws: Iterable[Integers] = (), *, max_detections: int = 100
) -> Floats:
    """COCO's mAP of the whole set, then of each draw; NaN for a draw with nothing to find.

    A draw says how often the set has each image, (I,), in the order of their ids. `max_detections`: boxes with the
    highest scores that count in each category of an image.
    """
    evaluator = evaluator_of(document, results, separate_eval=True)
    params = evaluator.params
    params.areaRng, params.areaRngLbl, params.maxDets = [[0, 1e10]], ["all"], [max_detections]
    evaluator.evaluate()
    # The matches of each category and image, as the library keeps them.
    cells = np.array(evaluator._evalImgs_cpp, dtype=object).reshape(-1, len(params.imgIds))
    found = []
    for counts in (np.ones(len(params.imgIds), dtype=np.int64), *draws):
        index = np.repeat(np.arange(len(counts)), counts)
        evaluator._evalImgs_cpp = cells[:, index].ravel().tolist()
        evaluator._paramsEval.imgIds = list(range(len(index)))
        evaluator.accumulate()
        precision = np.asarray(evaluator.eval["precision"])
        known = precision[precision > -1]  # a category without annotations has the precision -1
        found.append(known.mean() if known.size else np.nan)
    return np.array(found)


def draw_images(images: int, resamples: int, seed: int) -> Integers:
    """`resamples` draws of `images` images with replacement, as counts (resamples, images). The same for a seed."""
    generator = np.random.default_rng(seed)
    return np.asarray(generator.multinomial(images, np.full(images, 1 / images), size=resamples), dtype=np.int64)


def interval_of(pairs: Sequence[Floats]) -> tuple[float, float]:
    """The central interval of the mean over pairs of runs of their differences (resamples,), at `CONFIDENCE`."""
    mean = np.mean(np.stack(pairs), axis=0)
    low, high = np.nanquantile(mean, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
