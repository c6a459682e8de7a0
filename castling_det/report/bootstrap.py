"""How sure a difference of mAP is: drawn again from the images, with replacement, both detectors on the same draws.

Detections are matched once. A draw only counts the images' matches as often as they were drawn and accumulates them
as COCO does, so that a draw costs milliseconds and gives what COCO's evaluation of that set of images would give.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.report.evaluation import evaluator_of, load_truth

__all__ = ["CONFIDENCE", "Matches", "draw_images", "interval_of", "mean_average_precisions"]

CONFIDENCE = 0.95
"""Of every interval."""

_MAX_DETECTIONS = 100

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class _Category:
    """Detections of one category over all images, best score first, and the annotations to be found.

    `right` and `wrong` (T, D) at each IoU threshold; neither is an ignored one. `image` (S,), `start` (S,) and `length`
    (S,) are of runs of detections of one image and one score. `positives` (I,) are annotations by image.
    """

    right: Flags
    wrong: Flags
    image: Integers
    start: Integers
    length: Integers
    positives: Integers


class Matches:
    """Which detections of a results file are right at each of COCO's IoU thresholds, by image.

    Args:
        document: COCO annotations.
        results: boxes of a COCO results file.
    """

    def __init__(self, document: dict[str, Any], results: list[dict[str, Any]]) -> None:
        evaluator = evaluator_of(load_truth(document), results)
        params = evaluator.params
        params.areaRng, params.areaRngLbl, params.maxDets = [[0, 1e10]], ["all"], [_MAX_DETECTIONS]
        with redirect_stdout(io.StringIO()):
            evaluator.evaluate()
        self.images = tuple(int(image) for image in params.imgIds)
        """Ids of the images, in ascending order."""
        self._recalls: Floats = np.asarray(params.recThrs)
        per_category = np.array_split(np.array(evaluator.evalImgs, dtype=object), max(len(params.catIds), 1))
        self._categories = [_category(list(rows), len(params.iouThrs)) for rows in per_category]

    def mean_average_precision(self, counts: Integers | None = None) -> float:
        """COCO's mAP of the set in which image `i` is `counts[i]` times, (I,); None counts each once.

        NaN if that set has nothing to find.
        """
        counts = np.ones(len(self.images), dtype=np.int64) if counts is None else counts
        found = [_average_precision(category, counts, self._recalls) for category in self._categories]
        values = [value for value in found if value is not None]
        # The mean over recalls, thresholds and categories at once, in COCO's order.
        return float(np.mean(np.stack(values, axis=-1))) if values else float("nan")


def draw_images(images: int, resamples: int, seed: int) -> Integers:
    """`resamples` draws of `images` images with replacement, as counts (resamples, images). The same for a seed.

    Raises:
        ValueError: nothing to draw from, or no draw.
    """
    if images < 1 or resamples < 1:
        raise ValueError(f"resamples={resamples} of images={images}: expected at least 1 of each")
    generator = np.random.default_rng(seed)
    return np.asarray(generator.multinomial(images, np.full(images, 1 / images), size=resamples), dtype=np.int64)


def mean_average_precisions(matches: Matches, draws: Integers) -> Floats:
    """mAP of every draw, (resamples,)."""
    return np.array([matches.mean_average_precision(counts) for counts in draws])


def interval_of(differences: Sequence[Floats]) -> tuple[float, float]:
    """The central interval of the mean over pairs of runs of their differences (resamples,), at `CONFIDENCE`."""
    mean = np.mean(np.stack(differences), axis=0)
    low, high = np.nanquantile(mean, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _category(rows: list[dict[str, Any] | None], thresholds: int) -> _Category:
    """From COCO's records of each image, None where it has neither a detection nor an annotation."""
    found = [(index, row) for index, row in enumerate(rows) if row is not None]
    scores = np.concatenate([np.zeros(0), *(np.asarray(row["dtScores"], dtype=float) for _, row in found)])
    images = np.repeat([index for index, _ in found] or [0], [len(row["dtScores"]) for _, row in found] or [0])
    # COCO's own order, so that equal scores are counted in the same order as there.
    order = np.argsort(-scores, kind="mergesort")
    flags = [
        np.concatenate([np.zeros((thresholds, 0)), *(row[key] for _, row in found)], axis=1)[:, order].astype(bool)
        for key in ("dtMatches", "dtIgnore")
    ]
    matched, ignored = flags
    scores, images = scores[order], images[order].astype(np.int64)
    same = (scores[1:] == scores[:-1]) & (images[1:] == images[:-1])
    start = np.flatnonzero(np.concatenate([np.ones(min(len(scores), 1), dtype=bool), ~same]))
    positives = np.zeros(len(rows), dtype=np.int64)
    for index, row in found:
        positives[index] = np.count_nonzero(np.asarray(row["gtIgnore"]) == 0)
    length = np.diff(np.append(start, len(scores)))
    # Over all areas only what matched a crowd is ignored.
    return _Category(matched & ~ignored, ~matched, images[start], start, length, positives)


def _average_precision(category: _Category, counts: Integers, recalls: Floats) -> Floats | None:
    """Precision at each threshold and recall (T, R) of a set of images; None if it has nothing to find."""
    positives = int(category.positives @ counts)
    if not positives:
        return None
    index = _repeated(category, counts)
    wrong = np.cumsum(category.wrong[:, index], axis=1, dtype=np.int32)
    result = np.zeros((len(wrong), len(recalls)))
    for threshold, right in enumerate(category.right[:, index]):
        # Recall and the best precision at it change at the right detections alone.
        places = np.flatnonzero(right)
        found = np.arange(1, len(places) + 1)
        precision = found / (found + wrong[threshold, places] + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(found / positives, recalls, side="left")
        result[threshold, reached < len(places)] = precision[reached[reached < len(places)]]
    return result


def _repeated(category: _Category, counts: Integers) -> Integers:
    """Index of the detections, each image's as often as it was drawn: copies of an image stand behind one another."""
    times = counts[category.image]
    start, length = np.repeat(category.start, times), np.repeat(category.length, times)
    before = np.cumsum(length) - length
    return np.asarray(np.repeat(start - before, length) + np.arange(int(length.sum())), dtype=np.int64)
