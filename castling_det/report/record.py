"""The typed records of a comparison of detectors. Tables, plots and pages are rendered from them alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from castling_det.report.codec import read_document, write_document
from castling_det.report.record_parts import (
    Comparison,
    Counts,
    Difference,
    ImageComparison,
    Latency,
    Machine,
    MaskOccupancy,
    Series,
    Speed,
    SpeedPoint,
)

__all__ = [
    "METRICS",
    "SCHEMA",
    "Comparison",
    "Counts",
    "Difference",
    "ImageComparison",
    "Latency",
    "Machine",
    "MaskOccupancy",
    "Report",
    "RunRecord",
    "Series",
    "Speed",
    "SpeedPoint",
    "read_report",
    "write_report_json",
]

SCHEMA = "castling_det.report/2"
"""Name and version of the JSON form. A change of any field raises the version."""

METRICS = ("mAP", "mAP50", "mAP75", "mAP_s", "mAP_m", "mAP_l")
"""COCO's average precisions, in [0, 1]: over IoU 0.50 to 0.95, at 0.50, at 0.75, of small, medium and large boxes."""

STATUSES = ("ok", "failed")


@dataclass(frozen=True)
class RunRecord:
    """One detector: how it was trained, what it scored, what it costs. A failed one says so in `status` and `reason`.

    `name` groups runs that differ in `seed` alone. `checkpoint_sha256` is that of the file that was tested. `gmacs` are
    10^9 multiply-adds of one image at `input_shape` (height, width) in pixels, `gmacs_by_kind` its parts.
    `metrics_source` says who measured the metrics. `precision` is that at recall 0, 0.01, ..., 1 with IoU 0.50, by
    category, of the run's predictions.
    `train_seconds` is the time of the iterations, without validation. `scalars` and `validation` are over training
    iterations. `notes` say what is missing and why.
    """

    name: str
    status: str
    reason: str | None = None
    seed: int | None = None
    attention: str | None = None
    work_dir: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    metrics_source: str | None = None
    precision: dict[str, tuple[float, ...]] = field(default_factory=dict)
    params: int | None = None
    gmacs: float | None = None
    gmacs_by_kind: dict[str, float] = field(default_factory=dict)
    input_shape: tuple[int, int] | None = None
    latency: Latency | None = None
    train_seconds: float | None = None
    iterations: int | None = None
    scalars: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    mask: MaskOccupancy = field(default_factory=MaskOccupancy)
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r}: expected 'ok' or 'failed'")
        if (self.status == "failed") != bool(self.reason):
            raise ValueError(f"reason={self.reason!r}: expected a reason for a failed run and None for an ok one")
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics: unknown {unknown}; expected some of {', '.join(METRICS)}")

    @property
    def ok(self) -> bool:
        """Whether the run did what it should."""
        return self.status == "ok"


@dataclass(frozen=True)
class Report:
    """A set of runs compared with the one named `baseline`; `deployed` names the one that is shipped.

    `differences` are of the names whose predictions and those of the baseline are at hand. `speed` is what benchmarks
    say of the same attention at other sizes.
    """

    baseline: str
    deployed: str
    dataset: str
    created_by: str
    created_at: str
    machine: Machine
    runs: tuple[RunRecord, ...]
    comparison: Comparison | None = None
    differences: tuple[Difference, ...] = ()
    speed: tuple[Speed, ...] = ()

    def __post_init__(self) -> None:
        names = {run.name for run in self.runs}
        for label, name in (("baseline", self.baseline), ("deployed", self.deployed)):
            if name not in names:
                raise ValueError(f"{label}={name!r}: expected the name of a run, one of {sorted(names)}")

    @property
    def failed(self) -> tuple[RunRecord, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if not run.ok)

    def runs_named(self, name: str) -> tuple[RunRecord, ...]:
        """The runs of one name, one a seed, failed ones included."""
        return tuple(run for run in self.runs if run.name == name)

    def difference_of(self, name: str) -> Difference | None:
        """What the bootstrap says of the runs of one name, if it was made."""
        return next((difference for difference in self.differences if difference.name == name), None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the runs, in the order given, each once."""
        return unique(run.name for run in self.runs)


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """`names` in their order, each once."""
    return tuple(dict.fromkeys(names))


def write_report_json(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the record, from which `read_report` gives an equal one."""
    write_document(path, report, schema=SCHEMA, field="report")


def read_report(path: str | os.PathLike[str]) -> Report:
    """Reads what `write_report_json` wrote, this version or an older one.

    Raises:
        ValueError: not JSON, of another schema or version, or a field that does not fit.
    """
    fix = "make the report again with tools/report.py"
    older = {"castling_det.report/1": _from_version_1}
    return read_document(path, Report, schema=SCHEMA, field="report", fix=fix, older=older)


def _from_version_1(report: Any) -> Any:
    """Without intervals, curves of precision, peak memory and benchmarks, which that version did not have."""
    if not isinstance(report, dict) or not isinstance(report.get("runs"), list):
        return report
    runs = []
    for run in report["runs"]:
        latency = run.get("latency")
        new = {"latency": latency and {**latency, "peak_mib": None, "source": None}}
        runs.append({**run, **new, "metrics_source": None, "precision": {}})
    return {**report, "runs": runs, "differences": [], "speed": []}
