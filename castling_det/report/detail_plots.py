"""Plots of speed over the size of the input, and of precision over recall, as inline SVG."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from castling_det.analysis.benchmark.variants import BASELINE, LINEAR
from castling_det.report.colors import FOREGROUND, run_color
from castling_det.report.drawing import MARKERS, finish, new_figure, svg_of
from castling_det.report.record import Report, RunRecord, Speed, unique

__all__ = ["average_precision_50", "categories_by_difference", "latency_over_size", "precision_over_recall"]


def latency_over_size(report: Report, speed: Speed) -> str:
    """Median latency of each variant over the number of tokens, with the span from p20 to p80 and the crossover."""
    with new_figure() as (figure, axes):
        variants = unique([BASELINE, LINEAR, *(point.variant for point in speed.points)])
        # Softmax and linear attention have the colours of the runs that they are the attention of.
        shown = {BASELINE: report.baseline, LINEAR: report.deployed}
        names = unique([*report.names, *(shown.get(variant, variant) for variant in variants)])
        for index, variant in enumerate(variants):
            points = sorted((point for point in speed.points if point.variant == variant), key=lambda p: p.tokens)
            color = run_color(shown.get(variant, variant), names)
            tokens = [point.tokens for point in points]
            axes.plot(
                tokens, [point.p50_ms for point in points], MARKERS[index % len(MARKERS)] + "-", color=color,
                markersize=5, label=variant,
            )  # fmt: skip
            spans = [point.p20_ms for point in points], [point.p80_ms for point in points]
            axes.fill_between(tokens, *spans, color=color, alpha=0.15, linewidth=0)
        _mark_crossover(axes, speed)
        sizes = {point.tokens: f"{point.height} x {point.width}\nN = {point.tokens}" for point in speed.points}
        unit = "map of tokens" if speed.level in ("core", "block") else "image, pixels"
        finish(axes, x=f"{unit}, height x width, with the number of tokens N", y="latency p50, ms", legend=True)
        axes.set(xscale="log", yscale="log")
        axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
        axes.set_xticks(list(sizes), labels=list(sizes.values()), fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        return svg_of(figure, f"latency over input size, {speed.level}, {speed.passes}, {speed.dtype}")


def _mark_crossover(axes: Axes, speed: Speed) -> None:
    if speed.crossover_tokens is None:
        return
    axes.axvline(speed.crossover_tokens, color=FOREGROUND, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        f"crossover: N = {speed.crossover_tokens:.0f}", (speed.crossover_tokens, 0.03),
        xycoords=("data", "axes fraction"), xytext=(5, 0), textcoords="offset points",
    )  # fmt: skip


def categories_by_difference(report: Report) -> list[str]:
    """Categories with curves of both, those first in which the deployed runs lose most at IoU 0.50."""
    mean: dict[str, dict[str, float]] = {}
    for name in (report.baseline, report.deployed):
        curves = [run.precision for run in report.runs_named(name) if run.ok and run.precision]
        shared = [category for category in (curves[0] if curves else {}) if all(category in c for c in curves)]
        mean[name] = {category: float(np.mean([c[category] for c in curves])) for category in shared}
    ours, theirs = mean[report.deployed], mean[report.baseline]
    both = [category for category in theirs if category in ours]
    return sorted(both, key=lambda category: (ours[category] - theirs[category], category))


def precision_over_recall(report: Report, category: str) -> str | None:
    """Precision of baseline and deployed runs at IoU 0.50, a line a seed; None without a curve."""
    recalls = np.linspace(0, 1, 101)
    with new_figure() as (figure, axes):
        for name in unique([report.baseline, report.deployed]):
            curves = _curves(report, name, category)
            for index, curve in enumerate(curves):
                mean = np.mean([average_precision_50(run, category) for run in report.runs_named(name) if run.ok])
                axes.plot(
                    recalls, curve, color=run_color(name, report.names), alpha=0.85, drawstyle="steps-pre",
                    label=None if index else f"{name}, AP50 {mean:.3f}",
                )  # fmt: skip
        if not axes.lines:
            return None
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        finish(axes, x="recall, in [0, 1]", y="precision, in [0, 1]", legend=True)
        return svg_of(figure, f"precision over recall of {category} at IoU 0.50")


def average_precision_50(run: RunRecord, category: str) -> float:
    """COCO's AP at IoU 0.50 of one category, in [0, 1]; NaN without a curve."""
    curve = run.precision.get(category)
    return float(np.mean(curve)) if curve is not None else float("nan")


def _curves(report: Report, name: str, category: str) -> list[tuple[float, ...]]:
    return [run.precision[category] for run in report.runs_named(name) if run.ok and category in run.precision]
