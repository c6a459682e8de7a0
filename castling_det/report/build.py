"""From work dirs to a report record, and to the pictures that go with it. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from castling_det.config import network_shape
from castling_det.report.attention_maps import AttentionPicture, read_picture
from castling_det.report.bootstrap import differences
from castling_det.report.compare import latency_of, read_benchmark
from castling_det.report.evaluation import Annotations, Found, match_boxes
from castling_det.report.gallery import Row, gallery
from castling_det.report.records import (
    Comparison,
    ImageComparison,
    Latency,
    MaskOccupancy,
    Report,
    RunRecord,
    read_json,
    this_machine,
)
from castling_det.report.runs import RunSpec, build_run, config_of

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
    latency: dict[str, Latency] | None = None,
    benchmarks: Sequence[Path] = (),
    score_threshold: float = 0.3,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
) -> Report:
    """Reads every run, and compares baseline and deployed image by image on the first seed that both have.

    The arguments are those of tools/report.py. `shape` (height, width) is where multiply-adds are counted; None takes
    what the baseline's test pipeline makes of the data set's most common image size. `latency` is measured elsewhere,
    by name of the run; a run without one takes it from `benchmarks`. With `resamples=0` differences have no interval.

    Raises:
        ValueError: `baseline` or `deployed` names no run; a latency of a run that is not there; a file that is not
            what it should be.
    """
    if unknown := sorted(set(latency or {}) - {spec.name for spec in specs}):
        raise ValueError(f"latency: {unknown} are no runs; expected some of {sorted({spec.name for spec in specs})}")
    counted: dict[str, Any] = {}
    shape = shape or _tested_shape(specs, baseline, annotations)
    measured = {path: read_benchmark(path) for path in benchmarks}
    runs: list[RunRecord] = []
    for spec in specs:
        known = (latency or {}).get(spec.name)
        run = build_run(spec, annotations=annotations, shape=shape, counted=counted, latency=known)
        config = config_of(spec) if run.config is not None and run.latency is None else None
        if config is not None:
            timed, notes = latency_of(measured, config[1], run.input_shape)
            run = replace(run, latency=timed, notes=(*run.notes, *notes))
        if any(other.mask.kept_fraction for other in runs):
            # Runs of one recipe follow the same schedule: one of them is drawn.
            run = replace(run, mask=MaskOccupancy(run.mask.empty_from))
        runs.append(run)
    report = Report(
        baseline=baseline,
        deployed=deployed,
        dataset=annotations.description,
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        runs=tuple(runs),
        benchmarks=tuple(measured.values()),
    )
    # After the report has said whether the names are those of runs: this takes its time.
    between = differences(
        specs, runs, annotations, baseline=baseline, resamples=resamples, bootstrap_seed=bootstrap_seed
    )
    report = replace(report, differences=between)
    pair = _pair(specs, report)
    if pair is None:
        return report
    found = _matched(annotations, pair[1:], score_threshold)
    images = [
        ImageComparison(image, name, *(boxes.get(image, Found()).counts for boxes in found))
        for image, name in annotations.file_names.items()
    ]
    # Largest differences first; of equal ones, images on which the deployed detector is worse.
    images.sort(key=lambda image: (-abs(image.f1_difference), image.f1_difference, image.file_name))
    comparison = Comparison(baseline, deployed, pair[0], score_threshold, IOU, tuple(images))
    return replace(report, comparison=comparison)


def comparison_pictures(
    report: Report, specs: Sequence[RunSpec], annotations: Annotations, images: Path, *, count: int = 8
) -> list[Row]:
    """The gallery of a report's comparison: its first `count` images, from the folder `images`; empty without one.

    Raises:
        ValueError: an image file that is missing or cannot be decoded; names it.
    """
    pair = _pair(specs, report)
    if report.comparison is None or pair is None:
        return []
    found = _matched(annotations, pair[1:], report.comparison.score_threshold)
    return gallery(report.comparison, annotations, images, found, count)


def read_latency(path: Path) -> dict[str, Latency]:
    """Latencies by name of the run, from `{"latency": {NAME: {p50_ms, threads, device, input_shape}}}`.

    `peak_mib` may be given too; the file itself is the source.

    Raises:
        ValueError: not of that form; names the file and the field.
    """
    form = '{"latency": {NAME: {"p50_ms": ..., "threads": ..., "device": ..., "input_shape": [H, W]}}}'
    rows = read_json(path, dict[str, dict[str, Latency]], form).get("latency")
    if rows is None:
        raise ValueError(f"{path}: expected {form}")
    return {name: replace(row, source=str(path)) for name, row in rows.items()}


def read_attention(path: Path) -> list[AttentionPicture]:
    """The picture in a PNG of tools/attention.py, or those of all PNGs in a folder, by name.

    Raises:
        ValueError: no such file, no PNG in the folder, or a PNG that tools/attention.py did not write.
    """
    files = sorted(path.glob("*.png")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise ValueError(f"--attention {path}: no such file, or no .png in the folder; tools/attention.py writes them")
    return [read_picture(file) for file in files]


def _tested_shape(specs: Sequence[RunSpec], baseline: str, annotations: Annotations) -> tuple[int, int] | None:
    for spec in specs:
        try:
            found = config_of(spec) if spec.name == baseline else None
        except ValueError:
            continue  # The run's own record says what is wrong with it.
        if found is not None and annotations.image_shape is not None:
            return network_shape(found[1], annotations.image_shape)
    return None


def _pair(specs: Sequence[RunSpec], report: Report) -> tuple[int | None, Path, Path] | None:
    """The first seed of which baseline and deployed are ok and have predictions, and their results files."""
    usable = [
        (run.name, run.seed, path)
        for spec, run in zip(specs, report.runs, strict=True)
        if run.ok and run.precision and (path := spec.predictions_file) is not None
    ]
    pairs = (
        (seed, theirs, ours)
        for name, seed, theirs in usable if name == report.baseline
        for other, same_seed, ours in usable if other == report.deployed and same_seed == seed
    )  # fmt: skip
    return next(pairs, None)


def _matched(
    annotations: Annotations, files: Sequence[Path], score: float
) -> tuple[dict[int, Found], dict[int, Found]]:
    baseline, deployed = (
        match_boxes(annotations.document, annotations.results(path), score=score, iou=IOU) for path in files
    )
    return baseline, deployed
