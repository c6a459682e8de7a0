"""Latency over sequence length as a picture, the crossover marked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from castling_det.analysis.benchmark.ratios import crossover, fault_of
from castling_det.analysis.benchmark.record import BenchmarkReport, BenchmarkRow
from castling_det.analysis.benchmark.variants import BASELINE, LINEAR
from castling_det.files import atomic_write

__all__ = ["write_plot"]

_PANEL = (4.8, 3.7)
_DPI = 110
# Okabe and Ito's palette, safe for the colour-blind; a marker each, for print in grey.
_LINES = {
    BASELINE: ("#0072b2", "o"),
    LINEAR: ("#d55e00", "s"),
    "published": ("#009e73", "D"),
    "castling": ("#aa4a86", "^"),
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


def write_plot(path: str | os.PathLike[str], report: BenchmarkReport) -> None:
    """Writes a PNG: a row a level, a column for each pass, dtype and batch."""
    levels = list(dict.fromkeys(group[0] for group in report.groups))
    columns = list(dict.fromkeys(group[1:] for group in report.groups))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_PANEL[0] * len(columns), _PANEL[1] * len(levels)), layout="constrained", dpi=_DPI)
        grid = figure.subplots(len(levels), len(columns), squeeze=False)
        for level, panels in zip(levels, grid, strict=True):
            for column, axes in zip(columns, panels, strict=True):
                _panel(axes, [row for row in report.rows if row.group == (level, *column)])
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png")


def _panel(axes: Axes, rows: Sequence[BenchmarkRow]) -> None:
    if not rows:
        axes.set_axis_off()
        return
    level, passes, dtype, batch = rows[0].group
    axes.set_title(f"{level}, {passes}, {dtype}, batch {batch}")
    drawn = [row for row in rows if row.variant in _LINES]
    lines = {name: [row for row in drawn if row.variant == name] for name in _LINES}
    left_out = [name for name, found in lines.items() if not _draw(axes, name, found) and found]
    _scale(axes, sorted({row.tokens for row in drawn if fault_of(row) is None}))
    notes = [_mark_crossover(axes, lines)] if lines[BASELINE] and lines[LINEAR] else []
    notes += [f"failed, skipped or parity red at some size: {', '.join(left_out)}"] if left_out else []
    axes.set_xlabel("\n".join(["tokens N", *notes]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", handlelength=1.8)


def _scale(axes: Axes, sizes: Sequence[int]) -> None:
    """Logarithmic axes, a tick a size; plain numbers even where the latencies span less than a decade."""
    axes.set(xscale="log", yscale="log", ylabel="p50 latency, ms")
    axes.set_xticks(sizes, labels=[str(size) for size in sizes], rotation=40 if len(sizes) > 6 else 0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _draw(axes: Axes, name: str, rows: Sequence[BenchmarkRow]) -> bool:
    """The medians of a variant with the span from p20 to p80; returns whether every row could be drawn."""
    good = sorted((row for row in rows if fault_of(row) is None), key=lambda row: row.size)
    timings = [row.timing for row in good if row.timing is not None]
    if timings:
        tokens = [row.tokens for row in good]
        color, marker = _LINES[name]
        axes.plot(tokens, [timing.p50_ms for timing in timings], color=color, marker=marker, label=name)
        low, high = [timing.p20_ms for timing in timings], [timing.p80_ms for timing in timings]
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    return len(good) == len(rows)


def _mark_crossover(axes: Axes, lines: dict[str, list[BenchmarkRow]]) -> str:
    """Draws the mark, if there is one; returns what to say of it."""
    found = crossover(lines[BASELINE], lines[LINEAR])
    if found.tokens is not None:
        axes.axvline(found.tokens, color="0.25", linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"N = {found.tokens:.0f}", (found.tokens, 0.03), xycoords=("data", "axes fraction"), xytext=(5, 0),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    return found.note
