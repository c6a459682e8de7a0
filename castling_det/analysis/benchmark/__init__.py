"""Latency and peak memory of softmax, linear and hybrid attention, with parity checked before anything is timed.

`run_benchmark` makes the record, `write_benchmark` renders it; ratios are made of the record's rows while rendering.
"""

from castling_det.analysis.benchmark.goals import GOALS, goals_markdown
from castling_det.analysis.benchmark.markdown import benchmark_markdown, machine_line
from castling_det.analysis.benchmark.options import BenchmarkOptions, parse_size
from castling_det.analysis.benchmark.record import (
    DTYPES,
    LEVELS,
    PASSES,
    BenchmarkReport,
    BenchmarkRow,
    Timing,
    read_benchmark,
)
from castling_det.analysis.benchmark.render import render_benchmark, write_benchmark
from castling_det.analysis.benchmark.run import run_benchmark
from castling_det.analysis.benchmark.variants import VARIANTS

__all__ = [
    "DTYPES",
    "GOALS",
    "LEVELS",
    "PASSES",
    "VARIANTS",
    "BenchmarkOptions",
    "BenchmarkReport",
    "BenchmarkRow",
    "Timing",
    "benchmark_markdown",
    "goals_markdown",
    "machine_line",
    "parse_size",
    "read_benchmark",
    "render_benchmark",
    "run_benchmark",
    "write_benchmark",
]
