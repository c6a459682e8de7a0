"""Plots of accuracy, cost and training as inline SVG; axes are named with units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from castling_det.report.colors import FOREGROUND, layer_color, run_color
from castling_det.report.drawing import MARKERS, finish, new_figure, svg_of
from castling_det.report.record import Report, RunRecord, Series
from castling_det.report.table import summaries

__all__ = ["accuracy_over_cost", "accuracy_over_latency", "cost_by_kind", "mask_occupancy", "training_curve"]

def accuracy_over_cost(report: Report) -> str | None:
    """mAP over GMACs: a small mark a seed, a large one the mean; None if no run has both."""
    return _accuracy_over(report, lambda run: run.gmacs, label=_cost_label(report), title="GMACs")


def accuracy_over_latency(report: Report) -> str | None:
    """The same over median latency in milliseconds."""
    shapes = {run.latency.input_shape for run in report.runs if run.latency is not None}
    at = " at {} x {} pixels".format(*shapes.pop()) if len(shapes) == 1 else ""
    label = f"latency of one image{at}, p50, ms"
    return _accuracy_over(
        report, lambda run: run.latency.p50_ms if run.latency is not None else None, label=label, title="latency"
    )


def _accuracy_over(
    report: Report, cost: Callable[[RunRecord], float | None], *, label: str, title: str
) -> str | None:
    with new_figure() as (figure, axes):
        drawn, costliest = 0, 0.0
        for index, summary in enumerate(summaries(report)):
            points = [
                (cost(run), run.metrics["mAP"])
                for run in summary.runs
                if run.ok and cost(run) is not None and run.metrics.get("mAP") is not None
            ]
            if not points:
                continue
            x, y = np.array(points, dtype=float).T
            color, marker = run_color(summary.name, report.names), MARKERS[index % len(MARKERS)]
            # Runs of equal cost and accuracy lie on one another: later ones are smaller, and rings.
            size = 13 - 3 * (drawn % 3)
            axes.plot(x, y, marker, color=color, markersize=4, alpha=0.55, markeredgewidth=0)
            axes.plot(
                x.mean(), y.mean(), marker, color=color, markersize=size, label=summary.name,
                markerfacecolor="none", markeredgewidth=2.2,
            )  # fmt: skip
            drawn, costliest = drawn + 1, max(costliest, float(x.max()))
        if not drawn:
            return None
        axes.set_xlim(right=1.12 * costliest)
        axes.margins(y=0.25)
        finish(axes, x=label, y="mAP, in [0, 1]", legend=True)
        return svg_of(figure, f"mAP over {title} of every run")


def cost_by_kind(report: Report) -> str | None:
    """GMACs by kind, a bar for the baseline and one for the deployed run; None unless both are known."""
    runs = [summary.first for summary in summaries(report) if summary.name in (report.baseline, report.deployed)]
    if len(runs) < 2 or not all(run.gmacs_by_kind for run in runs):
        return None
    kinds = sorted({kind for run in runs for kind in run.gmacs_by_kind})
    kinds.sort(key=lambda kind: max(run.gmacs_by_kind.get(kind, 0.0) for run in runs))
    with new_figure() as (figure, axes):
        thick = 0.38
        for index, run in enumerate(runs):
            places = [place + (0.5 - index) * thick for place in range(len(kinds))]
            values = [run.gmacs_by_kind.get(kind, 0.0) for kind in kinds]
            bars = axes.barh(places, values, thick, color=run_color(run.name, report.names), label=run.name)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        finish(axes, x=_cost_label(report), y="", legend=True)
        return svg_of(figure, "GMACs by kind of operation")


def training_curve(report: Report, key: str, *, validation: bool, label: str, log: bool = False) -> str | None:
    """A scalar over training iterations, a line a seed; None if no run logged it."""
    with new_figure() as (figure, axes):
        for names, lines in _distinct_lines(report, key, validation).items():
            for index, series in enumerate(lines):
                axes.plot(
                    *_points(series),
                    color=run_color(names[0], report.names),
                    alpha=0.85,
                    marker="o" if validation and len(series.steps) < 40 else None,
                    markersize=3,
                    label=None if index else ", ".join(names),
                )
        if not axes.lines:
            return None
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        finish(axes, x="training iteration", y=label, legend=True)
        return svg_of(figure, f"{label} over training")


def mask_occupancy(run: RunRecord, quantity: str, *, label: str) -> str | None:
    """What the mask of a run keeps over training, a line a layer; marks where it is empty. None without such series."""
    layers: dict[str, Series] = getattr(run.mask, quantity)
    if not layers:
        return None
    with new_figure() as (figure, axes):
        for index, (name, series) in enumerate(layers.items()):
            axes.plot(*_points(series), color=layer_color(index, len(layers)), label=name)
        axes.set_ylim(bottom=0)
        empty = run.mask.empty_from
        if empty is not None:
            axes.axvline(empty, color=FOREGROUND, linewidth=1.2, linestyle=(0, (4, 3)))
            last = max(series.steps[-1] for series in layers.values())
            side = "right" if empty > last / 3 else "left"
            axes.annotate(
                f"empty from {empty}", (empty, 0.97), xycoords=("data", "axes fraction"), ha=side, va="top",
                xytext=(-5 if side == "right" else 5, 0), textcoords="offset points",
            )  # fmt: skip
        finish(axes, x="training iteration", y=label, legend=True, columns=1 + (len(layers) > 6))
        return svg_of(figure, f"{label} over training, by layer")


def _distinct_lines(report: Report, key: str, validation: bool) -> dict[tuple[str, ...], list[Series]]:
    """The series of each name. Names with the same ones, as a run and the same run converted, share them."""
    shared: dict[tuple[Series, ...], list[str]] = {}
    for name in report.names:
        found = [(run.validation if validation else run.scalars).get(key) for run in report.runs_named(name)]
        lines = tuple(series for series in found if series and any(value is not None for value in series.values))
        if lines:
            shared.setdefault(lines, []).append(name)
    return {tuple(names): list(lines) for lines, names in shared.items()}


def _points(series: Series) -> tuple[Sequence[int], Sequence[float]]:
    """A value that was not finite leaves a gap in the line."""
    return series.steps, [float("nan") if value is None else value for value in series.values]


def _cost_label(report: Report) -> str:
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    return "GMACs of one image" + (" of {} x {} pixels".format(*shape) if shape else "")
