"""Writes a benchmark as JSON, Markdown and PNG. Nothing is measured here."""

from __future__ import annotations

import os
from pathlib import Path

from castling_det.analysis.benchmark.markdown import benchmark_markdown
from castling_det.analysis.benchmark.plot import write_plot
from castling_det.analysis.benchmark.record import BenchmarkReport, write_benchmark_json
from castling_det.files import write_text

__all__ = ["render_benchmark", "write_benchmark"]


def write_benchmark(out_dir: str | os.PathLike[str], report: BenchmarkReport) -> None:
    """Writes `benchmark.json`, `benchmark.md` and `benchmark.png` into `out_dir`, each atomically; makes the folder."""
    write_benchmark_json(Path(out_dir) / "benchmark.json", report)
    render_benchmark(out_dir, report)


def render_benchmark(out_dir: str | os.PathLike[str], report: BenchmarkReport) -> None:
    """Writes `benchmark.md` and `benchmark.png` alone."""
    write_text(Path(out_dir) / "benchmark.md", benchmark_markdown(report))
    write_plot(Path(out_dir) / "benchmark.png", report)
