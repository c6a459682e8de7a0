"""Plots as inline SVG: no frame around the data, axes named with units, text in the page's own font and colour."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from castling_det.analysis.record import Report, RunRecord, Series
from castling_det.analysis.report.colors import FOREGROUND, as_css_variables, layer_color, run_color
from castling_det.analysis.report.table import summaries

__all__ = ["accuracy_over_cost", "cost_by_kind", "mask_occupancy", "training_curve"]

_SIZE = (5.2, 3.5)
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "castling_det",
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FOREGROUND,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


def accuracy_over_cost(report: Report) -> str | None:
    """mAP over GMACs: a small mark a seed, a large one the mean; None if no run has both."""
    with _figure() as (figure, axes):
        drawn, costliest = 0, 0.0
        for index, summary in enumerate(summaries(report)):
            points = [
                (run.gmacs, run.metrics["mAP"])
                for run in summary.runs
                if run.ok and run.gmacs is not None and run.metrics.get("mAP") is not None
            ]
            if not points:
                continue
            x, y = np.array(points, dtype=float).T
            color, marker = run_color(summary.name, report.names), _MARKERS[index % len(_MARKERS)]
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
        _finish(axes, x=_cost_label(report), y="mAP, in [0, 1]", legend=True)
        return _svg(figure, "mAP over GMACs of every run")


def cost_by_kind(report: Report) -> str | None:
    """GMACs by kind, a bar for the baseline and one for the deployed run; None unless both are known."""
    runs = [summary.first for summary in summaries(report) if summary.name in (report.baseline, report.deployed)]
    if len(runs) < 2 or not all(run.gmacs_by_kind for run in runs):
        return None
    kinds = sorted({kind for run in runs for kind in run.gmacs_by_kind})
    kinds.sort(key=lambda kind: max(run.gmacs_by_kind.get(kind, 0.0) for run in runs))
    with _figure() as (figure, axes):
        thick = 0.38
        for index, run in enumerate(runs):
            places = [place + (0.5 - index) * thick for place in range(len(kinds))]
            values = [run.gmacs_by_kind.get(kind, 0.0) for kind in kinds]
            bars = axes.barh(places, values, thick, color=run_color(run.name, report.names), label=run.name)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axes.grid(False, axis="y")
        axes.margins(x=0.12)
        _finish(axes, x=_cost_label(report), y="", legend=True)
        return _svg(figure, "GMACs by kind of operation")


def training_curve(report: Report, key: str, *, validation: bool, label: str, log: bool = False) -> str | None:
    """A scalar over training iterations, a line a seed; None if no run logged it."""
    with _figure() as (figure, axes):
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
        _finish(axes, x="training iteration", y=label, legend=True)
        return _svg(figure, f"{label} over training")


def mask_occupancy(run: RunRecord, quantity: str, *, label: str) -> str | None:
    """What the mask of a run keeps over training, a line a layer; marks where it is empty. None without such series."""
    layers: dict[str, Series] = getattr(run.mask, quantity)
    if not layers:
        return None
    with _figure() as (figure, axes):
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
        _finish(axes, x="training iteration", y=label, legend=True, columns=1 + (len(layers) > 6))
        return _svg(figure, f"{label} over training, by layer")


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


def _finish(axes: Axes, *, x: str, y: str, legend: bool, columns: int = 1) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer="iteration" in x))
    axes.set_xlim(left=0)
    axes.tick_params(length=3, width=0.7)
    if legend:
        axes.legend(loc="best", ncols=columns, handlelength=1.6)


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    # A figure of its own, outside of pyplot: no global state, nothing to close, no display.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def _svg(figure: Figure, description: str) -> str:
    """The drawing as an element of an HTML page: no XML header, no metadata, no addresses, any width."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = f'<svg class="plot" role="img" aria-label="{description}" viewBox="{box.group(1)}">'
    return as_css_variables(re.sub(r"^<svg[^>]*>", head, text, count=1)).strip()
