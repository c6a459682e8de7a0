"""The records of a report: plain dataclasses, written and read as JSON by msgspec. Everything is rendered from them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from castling_det.files import write_text

SCHEMA = "castling_det.report/3"
"""Name and version of the JSON form. A change that old files do not fit raises the version."""

METRICS = ("mAP", "mAP50", "mAP75", "mAP_s", "mAP_m", "mAP_l")
"""COCO's average precisions, in [0, 1]: over IoU 0.50 to 0.95, at 0.50, at 0.75, of small, medium and large boxes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """A quantity over training: `values[i]` at iteration `steps[i]`, None where it was not finite."""

    steps: tuple[int, ...] = ()
    values: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values) or list(self.steps) != sorted(set(self.steps)):
            count = len(self.values)
            raise ValueError(f"steps: expected {count} ascending iterations, one a value, got {self.steps[:9]}")

    def thinned(self, points: int = 40) -> Series:
        """At most `points` of the values, evenly spread, first and last among them, to five digits."""
        last, gaps = len(self.steps) - 1, min(points, len(self.steps)) - 1
        kept = [round(index * last / max(gaps, 1)) for index in range(gaps + 1)]
        values = [self.values[index] for index in kept]
        rounded = tuple(None if value is None else float(f"{value:.5g}") for value in values)
        return Series(tuple(self.steps[index] for index in kept), rounded)


@dataclass(frozen=True)
class MaskOccupancy:
    """The share of weights, and of probability, above the mask's threshold in each layer over training.

    `empty_from` is the first logged iteration from which on no layer kept anything, None if there is none.
    """

    empty_from: int | None = None
    kept_fraction: dict[str, Series] = field(default_factory=dict)
    kept_mass: dict[str, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """The median latency of one image of `input_shape` (height, width) pixels, and the call's own memory in MiB."""

    p50_ms: float
    threads: int
    device: str
    input_shape: tuple[int, int]
    peak_mib: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Machine:
    """Where a record was made. `device` is the accelerator's name or `cpu`; `commit` that of the checkout, if any."""

    torch: str
    device: str
    cpu: str
    threads: int
    python: str
    commit: str | None

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.threads} threads, device {self.device}, torch {self.torch}, Python {self.python}, "
            f"commit {self.commit or 'none, not a checkout'}"
        )


@dataclass(frozen=True)
class Difference:
    """mAP of the runs `name` minus the baseline's: the mean over `pairs` of runs, one a seed.

    `low` to `high` is the interval at `confidence` over `resamples` draws of the `images` test images.
    """

    name: str
    value: float
    low: float
    high: float
    confidence: float
    pairs: int
    images: int
    resamples: int
    bootstrap_seed: int


@dataclass(frozen=True)
class Counts:
    """Detections of an image that are right (tp) and wrong (fp), and objects that were missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def f1(self) -> float:
        """In [0, 1]; 1 where there was nothing to find and nothing was found."""
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
    """Baseline and deployed run of a seed image by image, largest differences first.

    Boxes count from `score_threshold` on, and are right from `iou` on.
    """

    seed: int | None
    score_threshold: float
    iou: float
    images: tuple[ImageComparison, ...]


@dataclass(frozen=True)
class RunRecord:
    """One detector: how it was trained, what it scored, what it costs. A failed one has a `reason`.

    Runs of one `name` differ in `seed` alone. `checkpoint` is the file that was tested, `predictions` a results file
    that gives `metrics`, and `precision` its precision at recall 0, 0.01, ..., 1 with IoU 0.50, by category. `gmacs`
    are 10^9 multiply-adds of one image of `input_shape` (height, width) pixels. `train_seconds` leaves validation out.
    `loss` and `validation` (mAP) are thinned. `notes` say what is missing and why.
    """

    name: str
    reason: str | None = None
    seed: int | None = None
    attention: str | None = None
    work_dir: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    metrics_source: str | None = None
    predictions: str | None = None
    precision: dict[str, tuple[float, ...]] = field(default_factory=dict)
    params: int | None = None
    gmacs: float | None = None
    gmacs_by_kind: dict[str, float] = field(default_factory=dict)
    input_shape: tuple[int, int] | None = None
    latency: Latency | None = None
    train_seconds: float | None = None
    iterations: int | None = None
    loss: Series = Series()
    final_loss: float | None = None
    validation: Series = Series()
    mask: MaskOccupancy = field(default_factory=MaskOccupancy)
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.metrics) - set(METRICS)):
            raise ValueError(f"metrics: unknown {unknown}; expected some of {', '.join(METRICS)}")

    @property
    def ok(self) -> bool:
        """Whether the run did what it should."""
        return self.reason is None

    @property
    def figures(self) -> dict[str, float | None]:
        """What is averaged over seeds: metrics, `"loss"` at the end, `"seconds"` of training."""
        return {**self.metrics, "loss": self.final_loss, "seconds": self.train_seconds}


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
    differences: tuple[Difference, ...] = ()

    def __post_init__(self) -> None:
        for label, name in (("baseline", self.baseline), ("deployed", self.deployed)):
            if name not in self.names:
                raise ValueError(f"{label}={name!r}: expected the name of a run, one of {sorted(self.names)}")

    @property
    def failed(self) -> tuple[RunRecord, ...]:
        """The runs that failed."""
        return tuple(run for run in self.runs if not run.ok)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the runs, each once."""
        return unique(run.name for run in self.runs)

    def runs_named(self, name: str) -> tuple[RunRecord, ...]:
        """The runs of one name, one a seed, failed ones included."""
        return tuple(run for run in self.runs if run.name == name)

    def difference_of(self, name: str) -> Difference | None:
        """The bootstrap's result for the runs of one name, if it was made."""
        return next((difference for difference in self.differences if difference.name == name), None)


class Spread(NamedTuple):
    """Mean, sample standard deviation (None for a single value), smallest and largest of some seeds' values."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int

    def text(self, sign: str = "") -> str:
        """`0.312`, or `0.312 ± 0.008` over several; `sign="+"` writes it always."""
        return f"{self.mean:{sign}.3f}" + (f" ± {self.std:.3f}" if self.std is not None else "")


class Summary(NamedTuple):
    """The runs of one name. `seeds` of them are ok, `first` is the first of these.

    `spreads` are of `RunRecord.figures`, `differences` minus the baseline's; None where a seed lacks the figure.
    """

    name: str
    runs: tuple[RunRecord, ...]
    first: RunRecord
    seeds: int
    spreads: dict[str, Spread | None]
    differences: dict[str, Spread | None]


def summaries(report: Report) -> list[Summary]:
    """One summary a name, in the report's order."""
    baseline = [run for run in report.runs_named(report.baseline) if run.ok]
    result = []
    for name in report.names:
        runs = report.runs_named(name)
        good = [run for run in runs if run.ok]
        others = [] if name == report.baseline else good
        spreads = {key: _spread_of(run.figures.get(key) for run in good) for key in (*METRICS, "loss", "seconds")}
        differences = {key: _difference(others, baseline, key) for key in spreads}
        result.append(Summary(name, runs, [*good, *runs][0], len(good), spreads, differences))
    return result


def _spread_of(values: Iterable[float | None]) -> Spread | None:
    """None if a value is missing: a mean of the others would hide that."""
    found = list(values)
    numbers = [value for value in found if value is not None]
    if not numbers or len(numbers) < len(found):
        return None
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.mean(numbers), std, min(numbers), max(numbers), len(numbers))


def _difference(runs: Sequence[RunRecord], baseline: Sequence[RunRecord], key: str) -> Spread | None:
    """Seed by seed over the seeds that both have; where seeds cannot be paired, of the means, without a spread."""
    ours, theirs = ({run.seed: run.figures.get(key) for run in group} for group in (runs, baseline))
    if ours.keys() & theirs.keys() and len(ours) == len(runs) and len(theirs) == len(baseline):
        pairs = [(value, theirs[seed]) for seed, value in ours.items() if seed in theirs]
        return _spread_of(None if left is None or right is None else left - right for left, right in pairs)
    left_mean, right_mean = (_spread_of(run.figures.get(key) for run in group) for group in (runs, baseline))
    return _spread_of([left_mean.mean - right_mean.mean]) if left_mean and right_mean else None


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """`names` in their order, each once."""
    return tuple(dict.fromkeys(names))


def printable(text: str) -> str:
    """The text with U+FFFD for characters that no file or page can show: controls, halves of surrogate pairs."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)


def read_json(path: str | os.PathLike[str], kind: type[T], expected: str) -> T:
    """The content of a JSON file as a `kind`; else ValueError, one line with the file, the field and `expected`."""
    try:
        if not Path(path).is_file():
            raise ValueError("no such regular file")
        return msgspec.json.decode(Path(path).read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as {expected}: {' '.join(str(error).split())}") from error


def write_document(path: str | os.PathLike[str], value: Any, *, schema: str, field: str) -> None:
    """Writes the dataclass `value` as `{"schema": schema, field: ...}`; ValueError if it would not come back (NaN)."""
    encoded = msgspec.json.encode(value)
    msgspec.json.decode(encoded, type=type(value))
    document = msgspec.json.encode({"schema": schema, field: msgspec.Raw(encoded)})
    write_text(path, document.decode() + "\n")


def read_document(path: str | os.PathLike[str], kind: type[T], *, schema: str, field: str, fix: str) -> T:
    """Reads what `write_document` wrote; ValueError, with the `fix`, for another schema or a field that is wrong."""
    document = read_json(path, dict[str, msgspec.Raw], f"a record ({fix})")
    found = msgspec.json.decode(document.get("schema", b"null"))
    if found != schema:
        raise ValueError(f"{path}: schema={found!r}: expected {schema!r}; {fix}")
    try:
        return msgspec.json.decode(document.get(field, b"null"), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {field}: {error}; {fix}") from error


def write_report_json(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the record, from which `read_report` gives an equal one."""
    write_document(path, report, schema=SCHEMA, field="report")


def read_report(path: str | os.PathLike[str]) -> Report:
    """Reads what `write_report_json` wrote; ValueError as `read_document`."""
    return read_document(path, Report, schema=SCHEMA, field="report", fix="make the report again with tools/report.py")


def this_machine() -> Machine:
    """The machine and the checkout that this process runs on."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return Machine(
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        cpu=next(named, platform.processor() or platform.machine()),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        commit=_commit(),
    )


def _commit() -> str | None:
    """The commit of the checkout, with `+changes` if code or configs differ from it; None outside of one.

    Results and documents may differ: measuring writes them.
    """
    place = Path(__file__)
    code = [f":/{folder}" for folder in ("castling_det", "configs", "tools", "requirements")]

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=place.parent, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        # An installed wheel may lie in somebody else's repository: ask whether git tracks this very file.
        git("ls-files", "--error-unmatch", place.name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD").strip() + "+changes" * bool(changes)
    except (OSError, subprocess.SubprocessError):
        return None
