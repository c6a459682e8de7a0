"""From work dirs to a report record, and to the pictures that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from castling_det.analysis.codec import from_jsonable
from castling_det.analysis.complexity import Complexity
from castling_det.analysis.configs import network_shape
from castling_det.analysis.machine import this_machine
from castling_det.analysis.record import Latency, Report, RunRecord
from castling_det.analysis.report.compare import Annotations, compare
from castling_det.analysis.report.gallery import Row, gallery
from castling_det.analysis.report.runs import build_run, config_of
from castling_det.analysis.report.spec import RunSpec
from castling_det.analysis.work_dir import PREDICTIONS, find_predictions, read_json

__all__ = ["build_report", "comparison_pictures", "read_latency"]


def build_report(
    specs: Sequence[RunSpec],
    *,
    baseline: str,
    deployed: str,
    annotations: Annotations,
    created_by: str,
    shape: tuple[int, int] | None = None,
    latency: dict[str, Latency] | None = None,
    score_threshold: float = 0.3,
) -> Report:
    """Reads every run, and compares baseline and deployed image by image on the first seed that both have.

    Args:
        specs: the runs; those of one name are seeds of one another.
        baseline: name of the runs that the others are compared with.
        deployed: name of the runs that are shipped.
        annotations: ground truth of the images that were tested on.
        created_by: the command that makes this report.
        shape: height and width at which multiply-adds are counted from each run's config; None takes what the
            baseline's test pipeline makes of the data set's most common image size.
        latency: measured elsewhere, by name of the run.
        score_threshold: score from which on a box counts in the comparison by image.

    Raises:
        ValueError: `baseline` or `deployed` names no run.
    """
    counted: dict[str, Complexity] = {}
    shape = shape or _tested_shape(specs, baseline, annotations)
    runs = tuple(
        build_run(spec, shape=shape, counted=counted, latency=(latency or {}).get(spec.name)) for spec in specs
    )
    report = Report(
        baseline=baseline,
        deployed=deployed,
        dataset=annotations.description,
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        runs=runs,
    )
    pair = _pair(specs, runs, baseline, deployed)
    if pair is None:
        return report
    comparison = compare(
        annotations,
        *(annotations.detections(find_predictions(spec.test)) for spec in pair),
        names=(baseline, deployed),
        seed=runs[specs.index(pair[0])].seed,
        score_threshold=score_threshold,
    )
    return replace(report, comparison=comparison)


def comparison_pictures(
    report: Report, specs: Sequence[RunSpec], annotations: Annotations, images: Path, *, count: int = 8
) -> list[Row]:
    """The gallery of a report's comparison: its first `count` images, from the folder `images`; empty without one.

    Raises:
        ValueError: an image file that is missing or cannot be decoded; names it.
    """
    pair = _pair(specs, report.runs, report.baseline, report.deployed)
    if report.comparison is None or pair is None:
        return []
    baseline, deployed = (annotations.detections(find_predictions(spec.test)) for spec in pair)
    return gallery(report.comparison, annotations, images, baseline, deployed, count=count)


def read_latency(path: Path) -> dict[str, Latency]:
    """Latencies by name of the run, from `{"latency": {NAME: {p50_ms, threads, device, input_shape}}}`.

    Raises:
        ValueError: not of that form; names the file and the field.
    """
    document = read_json(path)
    rows = document.get("latency") if isinstance(document, dict) else None
    if not isinstance(rows, dict):
        raise ValueError(f'{path}: expected {{"latency": {{NAME: {{"p50_ms": ..., "threads": ..., ...}}}}}}')
    return {name: from_jsonable(Latency, row, where=f"{path}: {name}") for name, row in rows.items()}


def _tested_shape(specs: Sequence[RunSpec], baseline: str, annotations: Annotations) -> tuple[int, int] | None:
    for spec in specs:
        try:
            found = config_of(spec) if spec.name == baseline else None
        except ValueError:
            continue  # The run's own record says what is wrong with it.
        if found is not None and annotations.image_shape is not None:
            return network_shape(found[1], annotations.image_shape)
    return None


def _pair(
    specs: Sequence[RunSpec], runs: Sequence[RunRecord], baseline: str, deployed: str
) -> tuple[RunSpec, RunSpec] | None:
    """The first baseline run that is ok, and the deployed one of the same seed, both with predictions."""
    usable = [
        (spec, run) for spec, run in zip(specs, runs, strict=True) if run.ok and (spec.test / PREDICTIONS).is_file()
    ]
    for first, left in usable:
        for second, right in usable:
            if left.name == baseline and right.name == deployed and left.seed == right.seed:
                return first, second
    return None
