"""From work dirs to a report record, and to the pictures that go with it. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from castling_det.config import load_config, network_shape
from castling_det.files import sha256_of
from castling_det.report.complexity import Complexity, detector_complexity
from castling_det.report.evaluation import (
    CONFIDENCE,
    Annotations,
    Floats,
    Found,
    draw_images,
    interval_of,
    match_boxes,
    mean_average_precisions,
)
from castling_det.report.figures import Row, gallery
from castling_det.report.records import (
    Comparison,
    Difference,
    ImageComparison,
    Latency,
    MaskOccupancy,
    Report,
    RunRecord,
    this_machine,
    unique,
)
from castling_det.report.runs import RunSpec, build_run

IOU = 0.5
"""IoU from which on a box is right in the comparison by image."""


def build_report(
    specs: Sequence[RunSpec],
    *,
    baseline: str,
    deployed: str,
    annotations: Annotations,
    created_by: str,
    shape: tuple[int, int] | None = None,
    latency: Mapping[str, Latency] | None = None,
    score_threshold: float = 0.3,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
) -> Report:
    """Reads every run, and compares baseline and deployed image by image on the first seed that both have.

    The arguments are those of tools/report.py. `shape` (height, width) is where multiply-adds are counted; by default
    the baseline's test pipeline makes it of the data set's most common image size. `latency` is by name of the run.
    ValueError names a file or a name that is wrong.
    """
    latency = latency or {}
    if unknown := sorted(set(latency) - {spec.name for spec in specs}):
        raise ValueError(f"latency: {unknown} are no runs; expected some of {sorted({spec.name for spec in specs})}")
    runs = [build_run(spec, annotations=annotations, latency=latency.get(spec.name)) for spec in specs]
    config = next((run.config for run in runs if run.name == baseline and run.config is not None), None)
    if shape is None and config is not None and annotations.image_shape is not None:
        shape = network_shape(load_config(config), annotations.image_shape)
    counted: dict[str, Complexity] = {}
    runs = [with_costs(run, shape, counted) for run in runs]
    # Runs of one recipe follow the same schedule: only the first one's mask is drawn.
    drawn = next((run for run in runs if run.mask.kept_fraction), None)
    report = Report(
        baseline=baseline,
        deployed=deployed,
        dataset=annotations.description,
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        runs=tuple(run if run is drawn else replace(run, mask=MaskOccupancy(run.mask.empty_from)) for run in runs),
    )
    # After the report has said whether the names are those of runs: this takes its time.
    intervals = _differences(runs, annotations, baseline=baseline, resamples=resamples, bootstrap_seed=bootstrap_seed)
    report = replace(report, differences=intervals)
    theirs, ours = (_predictions_by_seed(runs, name) for name in (baseline, deployed))
    seeds = [seed for seed in theirs if seed in ours]
    if not seeds:
        return report
    report = replace(report, comparison=Comparison(seeds[0], score_threshold, IOU, images=()))
    found = _matched(report, annotations)
    images = [
        ImageComparison(image, name, *(boxes.get(image, Found()).counts for boxes in found))
        for image, name in annotations.file_names.items()
    ]
    # Largest differences first; of equal ones, images on which the deployed detector is worse.
    images.sort(key=lambda image: (-abs(image.f1_difference), image.f1_difference, image.file_name))
    return replace(report, comparison=Comparison(seeds[0], score_threshold, IOU, tuple(images)))


def with_costs(run: RunRecord, shape: tuple[int, int] | None, counted: dict[str, Complexity]) -> RunRecord:
    """The run with multiply-adds at `shape`, counted once for each model."""
    if run.config is None or shape is None:
        return run
    config = load_config(run.config)
    key = repr(config.model)
    try:
        found = counted[key] = counted.get(key) or detector_complexity(config, shape, name=run.config)
    except ValueError as error:
        return replace(run, notes=(*run.notes, f"parameters and multiply-adds are not known: {error}"))
    by_kind = {kind: macs / 1e9 for kind, macs in found.macs_by_kind.items()}
    return replace(run, params=found.params, gmacs=found.gmacs, gmacs_by_kind=by_kind, input_shape=found.input_shape)


def comparison_pictures(report: Report, annotations: Annotations, images: Path, *, count: int = 8) -> list[Row]:
    """The first `count` images of a report's comparison, from the folder `images`; none without a comparison."""
    if report.comparison is None:
        return []
    return gallery(report.comparison, annotations, images, _matched(report, annotations), count)


def _predictions_by_seed(runs: Iterable[RunRecord], name: str) -> dict[int | None, list[Path]]:
    """The results files of the runs of a name that are ok."""
    files: dict[int | None, list[Path]] = {}
    for run in runs:
        if run.name == name and run.ok and run.predictions is not None:
            files.setdefault(run.seed, []).append(Path(run.predictions))
    return files


def _matched(report: Report, annotations: Annotations) -> list[dict[int, Found]]:
    """The boxes of the baseline and of the deployed run, by image, as the report's comparison counts them."""
    compared = report.comparison
    assert compared is not None
    files = [_predictions_by_seed(report.runs, name)[compared.seed][0] for name in (report.baseline, report.deployed)]
    options = {"score": compared.score_threshold, "iou": compared.iou}
    return [match_boxes(annotations.document, annotations.results(file), **options) for file in files]


def _differences(
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

    theirs, found = _predictions_by_seed(runs, baseline), []
    for name in unique(run.name for run in runs if run.name != baseline):
        ours = _predictions_by_seed(runs, name)
        seeds = [seed for seed in ours if len(ours[seed]) == len(theirs.get(seed, ())) == 1]
        if not seeds or not resamples:
            continue
        pairs = [scores(ours[seed][0]) - scores(theirs[seed][0]) for seed in seeds]
        value = float(np.mean([pair[0] for pair in pairs]))
        low, high = interval_of([pair[1:] for pair in pairs])
        found.append(Difference(name, value, low, high, CONFIDENCE, len(pairs), images, resamples, bootstrap_seed))
    return tuple(found)
