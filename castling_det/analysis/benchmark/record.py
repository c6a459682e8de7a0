"""The typed record of a benchmark. Tables and plots are rendered from it alone; ratios are no part of it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from castling_det.report.records import Machine, read_document, write_document

__all__ = [
    "DTYPES",
    "LEVELS",
    "PASSES",
    "SCHEMA",
    "BenchmarkReport",
    "BenchmarkRow",
    "Timing",
    "read_benchmark",
    "write_benchmark_json",
]

SCHEMA = "castling_det.benchmark/1"
"""Name and version of the JSON form. A change of any field raises the version."""

LEVELS = ("core", "block", "backbone", "detector")
"""What is called: attention between its projections, a transformer block, a ViT, a whole detector."""

PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16")
STATUSES = ("ok", "failed", "skipped")


@dataclass(frozen=True)
class Timing:
    """Percentiles of the wall time of one call in milliseconds, over `repeats` calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class BenchmarkRow:
    """One variant of one case. A failed or skipped one says why in `reason`.

    `height` and `width` are of the token map (core, block) or of the image in pixels (backbone, detector); `tokens` is
    the length of the longest sequence that is attended over. `peak_mib` is memory in MiB beyond what stood before the
    call. `parity_rms` and `parity_max` are the worst errors against float64, relative to the RMS of the reference,
    within `tolerance_rms` and `tolerance_max` if `parity_ok`; None where they are not finite. `compared` says of what.
    """

    level: str
    variant: str
    passes: str
    dtype: str
    batch: int
    height: int
    width: int
    tokens: int
    status: str
    reason: str | None = None
    timing: Timing | None = None
    peak_mib: float | None = None
    parity_rms: float | None = None
    parity_max: float | None = None
    parity_ok: bool | None = None
    tolerance_rms: float | None = None
    tolerance_max: float | None = None
    compared: str | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("level", self.level, LEVELS),
            ("passes", self.passes, PASSES),
            ("dtype", self.dtype, DTYPES),
            ("status", self.status, STATUSES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
        if self.ok == bool(self.reason):
            raise ValueError(f"reason={self.reason!r}: expected None for status 'ok' and a reason for {self.status!r}")
        if self.ok and (self.timing is None or self.peak_mib is None or self.parity_ok is None):
            raise ValueError("timing, peak_mib, parity_ok: expected all of them for status 'ok'")

    @property
    def ok(self) -> bool:
        """Whether it was measured to the end."""
        return self.status == "ok"

    @property
    def parity_red(self) -> bool:
        """Whether the comparison was made and is out of tolerance."""
        return self.parity_ok is False

    @property
    def group(self) -> tuple[str, str, str, int]:
        """What a table has in common: level, passes, dtype, batch."""
        return self.level, self.passes, self.dtype, self.batch

    @property
    def size(self) -> tuple[int, int, int]:
        """Tokens, height and width: sorts by length of the sequence."""
        return self.tokens, self.height, self.width


@dataclass(frozen=True)
class BenchmarkReport:
    """All rows of a run. `embed_dims`, `num_heads` and `depth` are of core, block and backbone, not of the detector.

    `detector` is the pattern of the detector's configs, None where no detector was measured.
    """

    machine: Machine
    created_by: str
    created_at: str
    embed_dims: int
    num_heads: int
    depth: int
    detector: str | None
    rows: tuple[BenchmarkRow, ...]

    @property
    def green(self) -> bool:
        """Whether no row failed and no parity is red."""
        return not any(row.status == "failed" or row.parity_red for row in self.rows)

    @property
    def groups(self) -> tuple[tuple[str, str, str, int], ...]:
        """The groups of the rows, in the order measured, each once."""
        return tuple(dict.fromkeys(row.group for row in self.rows))


def write_benchmark_json(path: str | os.PathLike[str], report: BenchmarkReport) -> None:
    """Writes the record, from which `read_benchmark` gives an equal one."""
    write_document(path, report, schema=SCHEMA, field="benchmark")


def read_benchmark(path: str | os.PathLike[str]) -> BenchmarkReport:
    """Reads what `write_benchmark_json` wrote.

    Raises:
        ValueError: not such a file; names it and the fix.
    """
    fix = "measure again with tools/benchmark.py --out DIR"
    return read_document(path, BenchmarkReport, schema=SCHEMA, field="benchmark", fix=fix)
