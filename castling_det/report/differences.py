"""Differences of mAP from the baseline, with intervals over the test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from castling_det.files import sha256_of
from castling_det.report.bootstrap import CONFIDENCE, Matches, draw_images, interval_of, mean_average_precisions
from castling_det.report.compare import Annotations
from castling_det.report.record import Difference, RunRecord, unique
from castling_det.report.spec import RunSpec

__all__ = ["differences"]

Floats = NDArray[np.float64]


def differences(
    specs: Sequence[RunSpec],
    runs: Sequence[RunRecord],
    annotations: Annotations,
    *,
    baseline: str,
    resamples: int,
    bootstrap_seed: int,
) -> tuple[Difference, ...]:
    """One for each name whose runs, or some of them, share seeds with the baseline's and have predictions.

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
    scored = _Scored(annotations, draw_images(images, resamples, bootstrap_seed))
    found = []
    for name in unique(run.name for run in runs):
        seeds = [seed for seed in files.get(name, {}) if seed in files[baseline]]
        if name == baseline or not seeds:
            continue
        pairs = [(scored.of(files[name][seed]), scored.of(files[baseline][seed])) for seed in seeds]
        value = float(np.mean([ours[0] - theirs[0] for ours, theirs in pairs]))
        low, high = interval_of([ours[1:] - theirs[1:] for ours, theirs in pairs])
        found.append(
            Difference(name, value, low, high, CONFIDENCE, len(pairs), images, resamples, bootstrap_seed)
        )
    return tuple(found)


def _files_by_seed(specs: Sequence[RunSpec], runs: Sequence[RunRecord]) -> dict[str, dict[int | None, Path]]:
    """Results files by name and seed. Runs of one name and seed cannot be told apart: none of them is taken."""
    files: dict[str, dict[int | None, Path]] = {}
    twice = set()
    for spec, run in zip(specs, runs, strict=True):
        path = spec.predictions_file
        if not run.ok or not run.precision or path is None:
            continue
        if run.seed in files.setdefault(run.name, {}):
            twice.add((run.name, run.seed))
        files[run.name][run.seed] = path
    for name, seed in twice:
        del files[name][seed]
    return files


class _Scored:
    """mAP of the whole set, then of every draw, by content of the results file: a converted run shares its source's."""

    def __init__(self, annotations: Annotations, draws: NDArray[np.int64]) -> None:
        self._annotations = annotations
        self._draws = draws
        self._known: dict[str, Floats] = {}

    def of(self, path: Path) -> Floats:
        """(1 + resamples,)."""
        key = sha256_of(path)
        if key not in self._known:
            matches = Matches(self._annotations.document, self._annotations.results(path))
            drawn = mean_average_precisions(matches, self._draws)
            self._known[key] = np.concatenate([[matches.mean_average_precision()], drawn])
        return self._known[key]
