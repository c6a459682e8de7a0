"""From work dirs to a report record, and to the pictures that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from castling_det.config import network_shape
from castling_det.report.codec import from_jsonable
from castling_det.report.compare import Annotations, compare
from castling_det.report.complexity import Complexity
from castling_det.report.differences import differences
from castling_det.report.gallery import Row, gallery
from castling_det.report.machine import this_machine
from castling_det.report.record import Latency, Report, RunRecord
from castling_det.report.runs import build_run, config_of
from castling_det.report.spec import RunSpec
from castling_det.report.speed import Benchmarks
from castling_det.report.work_dir import read_json

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
    benchmarks: Sequence[Path] = (),
    score_threshold: float = 0.3,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
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
        benchmarks: records of tools/benchmark.py; a run without a latency of its own takes it from there.
        score_threshold: score from which on a box counts in the comparison by image.
        resamples: draws of the test images for the intervals of differences; 0 makes none.
        bootstrap_seed: of these draws.

    Raises:
        ValueError: `baseline` or `deployed` names no run; a latency of a run that is not there; a file that is not
            what it should be.
    """
    if unknown := sorted(set(latency or {}) - {spec.name for spec in specs}):
        raise ValueError(f"latency: {unknown} are no runs; expected some of {sorted({spec.name for spec in specs})}")
    counted: dict[str, Complexity] = {}
    shape = shape or _tested_shape(specs, baseline, annotations)
    measured = Benchmarks(benchmarks)
    runs = tuple(
        _timed(build_run(spec, annotations=annotations, shape=shape, counted=counted,
                         latency=(latency or {}).get(spec.name)), spec, measured)
        for spec in specs
    )  # fmt: skip
    report = Report(
        baseline=baseline,
        deployed=deployed,
        dataset=annotations.description,
        created_by=created_by,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=this_machine(),
        runs=runs,
        speed=measured.speeds(),
    )
    # After the report has said whether the names are those of runs: this takes its time.
    between = differences(
        specs, runs, annotations, baseline=baseline, resamples=resamples, bootstrap_seed=bootstrap_seed
    )
    report = replace(report, differences=between)
    pair = _pair(specs, runs, baseline, deployed)
    if pair is None:
        return report
    comparison = compare(
        annotations,
        *(annotations.detections(path) for _, path in pair),
        names=(baseline, deployed),
        seed=pair[0][0].seed,
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
    baseline, deployed = (annotations.detections(path) for _, path in pair)
    return gallery(report.comparison, annotations, images, baseline, deployed, count=count)


def read_latency(path: Path) -> dict[str, Latency]:
    """Latencies by name of the run, from `{"latency": {NAME: {p50_ms, threads, device, input_shape}}}`.

    `peak_mib` may be given too; the file itself is the source.

    Raises:
        ValueError: not of that form; names the file and the field.
    """
    document = read_json(path)
    rows = document.get("latency") if isinstance(document, dict) else None
    if not isinstance(rows, dict):
        raise ValueError(f'{path}: expected {{"latency": {{NAME: {{"p50_ms": ..., "threads": ..., ...}}}}}}')
    latencies = {}
    for name, row in rows.items():
        whole = {"peak_mib": None, **row, "source": str(path)} if isinstance(row, dict) else row
        latencies[name] = from_jsonable(Latency, whole, where=f"{path}: {name}")
    return latencies


def _tested_shape(specs: Sequence[RunSpec], baseline: str, annotations: Annotations) -> tuple[int, int] | None:
    for spec in specs:
        try:
            found = config_of(spec) if spec.name == baseline else None
        except ValueError:
            continue  # The run's own record says what is wrong with it.
        if found is not None and annotations.image_shape is not None:
            return network_shape(found[1], annotations.image_shape)
    return None


def _timed(run: RunRecord, spec: RunSpec, benchmarks: Benchmarks) -> RunRecord:
    """With the latency that a benchmark of the same detector gives, if the run has none."""
    found = config_of(spec) if run.config is not None and run.latency is None else None
    if found is None:
        return run
    latency, notes = benchmarks.latency(found[1], run.input_shape)
    return replace(run, latency=latency, notes=(*run.notes, *notes))


def _pair(
    specs: Sequence[RunSpec], runs: Sequence[RunRecord], baseline: str, deployed: str
) -> tuple[tuple[RunRecord, Path], tuple[RunRecord, Path]] | None:
    """The first baseline run that is ok, and the deployed one of the same seed, with the predictions of both."""
    usable = [
        (run, path)
        for spec, run in zip(specs, runs, strict=True)
        if run.ok and run.precision and (path := spec.predictions_file) is not None
    ]
    for left in usable:
        for right in usable:
            if left[0].name == baseline and right[0].name == deployed and left[0].seed == right[0].seed:
                return left, right
    return None
