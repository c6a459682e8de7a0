"""How sure a difference of mAP is: images are drawn again with replacement, both detectors on the same draws.

Detections are matched once. A draw only accumulates each image's matches as often as the image was drawn, in
faster-coco-eval's own code, and so gives the mAP that evaluating the drawn set would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.files import sha256_of
from castling_det.report.evaluation import Annotations, evaluator_of
from castling_det.report.records import Difference, RunRecord, unique

CONFIDENCE = 0.95
"""Confidence of every interval."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


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


def predictions_by_seed(runs: Iterable[RunRecord], name: str) -> dict[int | None, list[Path]]:
    """The results files of the runs of a name that are ok."""
    files: dict[int | None, list[Path]] = {}
    for run in runs:
        if run.name == name and run.ok and run.predictions is not None:
            files.setdefault(run.seed, []).append(Path(run.predictions))
    return files


def differences(
    runs: Sequence[RunRecord], annotations: Annotations, *, baseline: str, resamples: int, bootstrap_seed: int
) -> tuple[Difference, ...]:
    """One for each name of which some runs share seeds with the baseline's; none with `resamples=0`.

    Runs of one name and seed cannot be told apart: none of them is taken.
    """
    if resamples < 0:
        raise ValueError(f"resamples={resamples}: expected 0, for none, or more")
    images, known = len(annotations.file_names), dict[str, Floats]()
    draws = draw_images(images, resamples, bootstrap_seed) if images else np.empty((0, 0), np.int64)

    def scores(path: Path) -> Floats:
        """Files of equal content, as of a converted run, share their scores."""
        key = sha256_of(path)
        if key not in known:
            known[key] = mean_average_precisions(annotations.document, annotations.results(path), draws)
        return known[key]

    theirs, found = predictions_by_seed(runs, baseline), []
    for name in unique(run.name for run in runs if run.name != baseline):
        ours = predictions_by_seed(runs, name)
        seeds = [seed for seed in ours if len(ours[seed]) == len(theirs.get(seed, ())) == 1]
        if not seeds or not resamples:
            continue
        pairs = [scores(ours[seed][0]) - scores(theirs[seed][0]) for seed in seeds]
        value = float(np.mean([pair[0] for pair in pairs]))
        low, high = interval_of([pair[1:] for pair in pairs])
        found.append(Difference(name, value, low, high, CONFIDENCE, len(pairs), images, resamples, bootstrap_seed))
    return tuple(found)
