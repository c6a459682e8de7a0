"""How sure a difference of mAP is: images are drawn again with replacement, both detectors on the same draws.

Detections are matched once. A draw only accumulates each image's matches as often as the image was drawn, in
faster-coco-eval's own code, and so gives the mAP that evaluating the drawn set would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.files import sha256_of
from castling_det.report.evaluation import Annotations, evaluator_of
from castling_det.report.records import Difference, RunRecord, unique
from castling_det.report.runs import RunSpec

CONFIDENCE = 0.95
"""Confidence of every interval."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Matches:
    """The matches of a results file, by category and image.

    Args:
        document: COCO annotations.
        results: boxes of a COCO results file.
    """

    def __init__(self, document: Any, results: Sequence[Any]) -> None:
        self._evaluator = evaluator_of(document, results, separate_eval=True)
        params = self._evaluator.params
        params.areaRng, params.areaRngLbl, params.maxDets = [[0, 1e10]], ["all"], [100]
        self._evaluator.evaluate()
        self.images = tuple(int(image) for image in params.imgIds)
        """Ids of the images, in ascending order."""
        # The matches of each category and image, as the library keeps them.
        self._cells = np.array(self._evaluator._evalImgs_cpp, dtype=object).reshape(-1, len(self.images))

    def mean_average_precision(self, counts: Integers | None = None) -> float:
        """COCO's mAP of the set in which image `i` is `counts[i]` times, (I,); None counts each once.

        NaN if that set has nothing to find.
        """
        index = np.repeat(np.arange(len(self.images)), 1 if counts is None else counts)
        self._evaluator._evalImgs_cpp = self._cells[:, index].ravel().tolist()
        self._evaluator._paramsEval.imgIds = list(range(len(index)))
        self._evaluator.accumulate()
        precision = np.asarray(self._evaluator.eval["precision"])
        # A category without annotations has the precision -1.
        return float(precision[precision > -1].mean()) if (precision > -1).any() else float("nan")


def draw_images(images: int, resamples: int, seed: int) -> Integers:
    """`resamples` draws of `images` images with replacement, as counts (resamples, images). The same for a seed.

    Raises:
        ValueError: nothing to draw from, or no draw.
    """
    if images < 1 or resamples < 1:
        raise ValueError(f"resamples={resamples} of images={images}: expected at least 1 of each")
    generator = np.random.default_rng(seed)
    return np.asarray(generator.multinomial(images, np.full(images, 1 / images), size=resamples), dtype=np.int64)


def interval_of(pairs: Sequence[Floats]) -> tuple[float, float]:
    """The central interval of the mean over pairs of runs of their differences (resamples,), at `CONFIDENCE`."""
    mean = np.mean(np.stack(pairs), axis=0)
    low, high = np.nanquantile(mean, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def differences(
    specs: Sequence[RunSpec],
    runs: Sequence[RunRecord],
    annotations: Annotations,
    *,
    baseline: str,
    resamples: int,
    bootstrap_seed: int,
) -> tuple[Difference, ...]:
    """One for each name of which some runs share seeds with the baseline's and have predictions.

    Args:
        specs: where the runs lie.
        runs: their records, in the same order.
        annotations: of the test images.
        baseline: name of the runs to compare with.
        resamples: draws of the images; 0 makes no interval at all.
        bootstrap_seed: of the draws.

    Raises:
        ValueError: negative `resamples`; a results file that does not belong to the annotations.
    """
    if resamples < 0:
        raise ValueError(f"resamples={resamples}: expected 0, for none, or more")
    files = _files_by_seed(specs, runs)
    if not resamples or baseline not in files:
        return ()
    images = len(annotations.file_names)
    draws = draw_images(images, resamples, bootstrap_seed)
    known: dict[str, Floats] = {}

    def scores(path: Path) -> Floats:
        """mAP of the whole set, then of every draw. Files of equal content, as of a converted run, share theirs."""
        key = sha256_of(path)
        if key not in known:
            matches = Matches(annotations.document, annotations.results(path))
            known[key] = np.array([matches.mean_average_precision(counts) for counts in (None, *draws)])
        return known[key]

    found = []
    for name in unique(run.name for run in runs):
        seeds = [seed for seed in files.get(name, {}) if seed in files[baseline]]
        if name == baseline or not seeds:
            continue
        pairs = [scores(files[name][seed]) - scores(files[baseline][seed]) for seed in seeds]
        value = float(np.mean([pair[0] for pair in pairs]))
        low, high = interval_of([pair[1:] for pair in pairs])
        found.append(Difference(name, value, low, high, CONFIDENCE, len(pairs), images, resamples, bootstrap_seed))
    return tuple(found)


def _files_by_seed(specs: Sequence[RunSpec], runs: Sequence[RunRecord]) -> dict[str, dict[int | None, Path]]:
    """Results files by name and seed. Runs of one name and seed cannot be told apart: none of them is taken."""
    files: dict[str, dict[int | None, list[Path]]] = {}
    for spec, run in zip(specs, runs, strict=True):
        if run.ok and run.precision and (path := spec.predictions_file) is not None:
            files.setdefault(run.name, {}).setdefault(run.seed, []).append(path)
    return {
        name: {seed: paths[0] for seed, paths in by_seed.items() if len(paths) == 1} for name, by_seed in files.items()
    }
