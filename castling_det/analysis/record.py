"""The typed records of a comparison of detectors. Tables, plots and pages are rendered from them alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from castling_det.analysis.codec import read_document, write_document

__all__ = [
    "METRICS",
    "SCHEMA",
    "Comparison",
    "Counts",
    "ImageComparison",
    "Latency",
    "Machine",
    "MaskOccupancy",
    "Report",
    "RunRecord",
    "Series",
    "read_report",
    "write_report_json",
]

SCHEMA = "castling_det.report/1"
"""Name and version of the JSON form. A change of any field raises the version."""

METRICS = ("mAP", "mAP50", "mAP75", "mAP_s", "mAP_m", "mAP_l")
"""COCO's average precisions, in [0, 1]: over IoU 0.50 to 0.95, at 0.50, at 0.75, of small, medium and large boxes."""

STATUSES = ("ok", "failed")


@dataclass(frozen=True)
class Series:
    """A quantity over training: `values[i]` at iteration `steps[i]`, None where it was not finite."""

    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values) or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(
                f"steps: expected {len(self.values)} ascending iterations, one a value, got {self.steps[:9]}"
            )


@dataclass(frozen=True)
class MaskOccupancy:
    """What the mask of the softmax branch kept in each layer, over training.

    `kept_fraction` and `kept_mass` are in [0, 1], by layer (`blocks.0`); `threshold` is in the config's unit.
    """

    kept_fraction: dict[str, Series] = field(default_factory=dict)
    kept_mass: dict[str, Series] = field(default_factory=dict)
    threshold: Series = Series()

    @property
    def empty_from(self) -> int | None:
        """First logged iteration from which on no layer kept anything; None if there is none."""
        kept: dict[int, float] = {}
        for series in self.kept_fraction.values():
            for step, value in zip(series.steps, series.values, strict=True):
                # A value that is not finite is no proof of an empty mask.
                kept[step] = max(kept.get(step, 0.0), 1.0 if value is None else value)
        first = None
        for step in sorted(kept, reverse=True):
            if kept[step] > 0:
                break
            first = step
        return first


@dataclass(frozen=True)
class Latency:
    """A measured latency: median in milliseconds of one image at `input_shape` (height, width)."""

    p50_ms: float
    threads: int
    device: str
    input_shape: tuple[int, int]


@dataclass(frozen=True)
class RunRecord:
    """One detector: how it was trained, what it scored, what it costs. A failed one says so in `status` and `reason`.

    `name` groups runs that differ in `seed` alone. `checkpoint_sha256` is that of the file that was tested. `gmacs` are
    10^9 multiply-adds of one image at `input_shape` (height, width) in pixels, `gmacs_by_kind` its parts.
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
    params: int | None = None
    gmacs: float | None = None
    gmacs_by_kind: dict[str, float] = field(default_factory=dict)
    input_shape: tuple[int, int] | None = None
    latency: Latency | None = None
    train_seconds: float | None = None
    iterations: int | None = None
    scalars: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    mask: MaskOccupancy = MaskOccupancy()
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
class Counts:
    """Detections of an image that are right (tp) and wrong (fp), and objects that were missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def f1(self) -> float:
        """2 tp / (2 tp + fp + fn), in [0, 1]; 1 where there was nothing to find and nothing was found."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0


@dataclass(frozen=True)
class ImageComparison:
    """The counts of two detectors on one image of the annotation file."""

    image_id: int
    file_name: str
    baseline: Counts
    deployed: Counts

    @property
    def f1_difference(self) -> float:
        """Deployed minus baseline, in [-1, 1]."""
        return self.deployed.f1 - self.baseline.f1


@dataclass(frozen=True)
class Comparison:
    """Two detectors image by image, largest differences first. Boxes count from `score_threshold`, right at `iou`."""

    baseline: str
    deployed: str
    seed: int | None
    score_threshold: float
    iou: float
    images: tuple[ImageComparison, ...]


@dataclass(frozen=True)
class Machine:
    """Where a report was made. `device` is the accelerator's name or `cpu`; `commit` that of the checkout, if any."""

    torch: str
    device: str
    cpu: str
    threads: int
    python: str
    commit: str | None


@dataclass(frozen=True)
class Report:
    """A set of runs compared with the one named `baseline`; `deployed` names the one that is shipped."""

    baseline: str
    deployed: str
    dataset: str
    created_by: str
    created_at: str
    machine: Machine
    runs: tuple[RunRecord, ...]
    comparison: Comparison | None = None

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
    """Reads what `write_report_json` wrote.

    Raises:
        ValueError: not JSON, of another schema or version, or a field that does not fit.
    """
    fix = "make the report again with tools/report.py"
    return read_document(path, Report, schema=SCHEMA, field="report", fix=fix)
