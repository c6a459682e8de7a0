"""The plots of a report, each an SVG drawing of its own. A plot is None where the runs have nothing to draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from castling_det.report.compare import crossover, summaries
from castling_det.report.records import BenchmarkRow, Report, RunRecord, Series, unique

# Okabe and Ito's palette, safe for the colour-blind, in an order in which neighbours differ in lightness too.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4a86", "#7a6a00", "#4d4d4d")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_DASHES = (0, (4, 3))
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "castling_det",
    "text.parse_math": False,  # names are no formulas
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


class Drawing:
    """One plot on `axes`; `svg` is the drawing as a file, once it is finished."""

    def __init__(self) -> None:
        # A figure of its own, outside of pyplot: no global state, nothing to close, no display.
        self.figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        self.axes = self.figure.add_subplot()
        self.svg: str | None = None

    def finish(self, *, x: str, y: str, columns: int = 1, left: float | None = 0) -> None:
        """Names the axes, explains the lines, and writes the file."""
        axes = self.axes
        axes.set(xlabel=x, ylabel=y)
        if left is not None:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer="iteration" in x))
            axes.set_xlim(left=left)
        axes.legend(loc="best", ncols=columns, handlelength=1.6)
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        self.svg = buffer.getvalue()

    def logarithmic(self, axis: Literal["x", "y"]) -> None:
        """Makes an axis logarithmic, with plain numbers at 1, 2, 5, 10, ..."""
        self.axes.set(**{f"{axis}scale": "log"})
        found = {"x": self.axes.xaxis, "y": self.axes.yaxis}[axis]
        found.set_major_locator(LogLocator(subs=(1, 2, 5)))
        found.set_major_formatter("{x:g}")
        found.set_minor_formatter(NullFormatter())

    def mark(self, x: float, text: str, *, right: bool = True, top: bool = False) -> None:
        """A dashed vertical line with a text beside it."""
        self.axes.axvline(x, color="black", linewidth=1.2, linestyle=_DASHES)
        self.axes.annotate(
            text, (x, 0.97 if top else 0.03), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(5 if right else -5, 0), ha="left" if right else "right", va="top" if top else "bottom",
        )  # fmt: skip


@contextmanager
def _drawing() -> Iterator[Drawing]:
    with matplotlib.rc_context(_STYLE):
        yield Drawing()


def run_color(name: str, names: Sequence[str]) -> str:
    """The colour of a run, in every plot and table; runs past the sixth begin again."""
    return _COLORS[list(names).index(name) % len(_COLORS)]


def label_of(text: str) -> str:
    """A name as matplotlib and an SVG file can show it: printable, not too long, no "_" in front, which hides it."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    shown = shown if len(shown) <= 48 else f"{shown[:47]}\N{HORIZONTAL ELLIPSIS}"
    return f" {shown}" if shown.startswith("_") else shown


def accuracy_over_cost(report: Report) -> str | None:
    """mAP over GMACs: a small mark a seed, a large one the mean."""
    return _accuracy_over(report, lambda run: run.gmacs, _cost_label(report))


def accuracy_over_latency(report: Report) -> str | None:
    """mAP over median latency."""
    shapes = {run.latency.input_shape for run in report.runs if run.latency is not None}
    at = " at {} x {} pixels".format(*shapes.pop()) if len(shapes) == 1 else ""
    return _accuracy_over(
        report, lambda run: run.latency.p50_ms if run.latency is not None else None,
        f"latency of one image{at}, p50, ms",
    )  # fmt: skip


def _accuracy_over(report: Report, cost: Callable[[RunRecord], float | None], label: str) -> str | None:
    with _drawing() as drawing:
        drawn, costliest = 0, 0.0
        for index, summary in enumerate(summaries(report)):
            pairs = [(cost(run), run.metrics.get("mAP")) for run in summary.runs if run.ok]
            points = [(x, y) for x, y in pairs if x is not None and y is not None]
            if not points:
                continue
            x, y = np.array(points, dtype=float).T
            color, marker = run_color(summary.name, report.names), _MARKERS[index % len(_MARKERS)]
            drawing.axes.plot(x, y, marker, color=color, markersize=4, alpha=0.55, markeredgewidth=0)
            # Runs of equal cost and accuracy lie on one another: later ones are smaller, and rings.
            drawing.axes.plot(
                x.mean(), y.mean(), marker, color=color, markersize=13 - 3 * (drawn % 3), markerfacecolor="none",
                markeredgewidth=2.2, label=label_of(summary.name),
            )  # fmt: skip
            drawn, costliest = drawn + 1, max(costliest, float(x.max()))
        if drawn:
            drawing.axes.set_xlim(right=1.12 * costliest)
            drawing.axes.margins(y=0.25)
            drawing.finish(x=label, y="mAP, in [0, 1]")
    return drawing.svg


def cost_by_kind(report: Report) -> str | None:
    """GMACs by kind, a bar for the baseline and one for the deployed run; None unless both are known."""
    runs = [summary.first for summary in summaries(report) if summary.name in (report.baseline, report.deployed)]
    if len(runs) < 2 or not all(run.gmacs_by_kind for run in runs):
        return None
    kinds = sorted({kind for run in runs for kind in run.gmacs_by_kind})
    kinds.sort(key=lambda kind: max(run.gmacs_by_kind.get(kind, 0.0) for run in runs))
    with _drawing() as drawing:
        for index, run in enumerate(runs):
            places = [place + (0.5 - index) * 0.38 for place in range(len(kinds))]
            values = [run.gmacs_by_kind.get(kind, 0.0) for kind in kinds]
            color, label = run_color(run.name, report.names), label_of(run.name)
            bars = drawing.axes.barh(places, values, 0.38, color=color, label=label)
            drawing.axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        drawing.axes.set_yticks(range(len(kinds)), [label_of(kind.replace("_", " ")) for kind in kinds])
        drawing.axes.grid(False, axis="y")
        drawing.axes.margins(x=0.12)
        drawing.finish(x=_cost_label(report), y="")
    return drawing.svg


def latency_over_size(report: Report, rows: Sequence[BenchmarkRow]) -> str | None:
    """Median latency of each variant over the number of tokens, with the span from p20 to p80 and the crossover."""
    # Softmax and linear attention have the colours of the runs that they are the attention of.
    shown = {"softmax": report.baseline, "linear": report.deployed}
    variants = unique([*shown, *(row.variant for row in rows)])
    names = unique([*report.names, *(shown.get(variant, variant) for variant in variants)])
    rows = sorted(rows, key=lambda row: row.tokens)
    with _drawing() as drawing:
        for index, variant in enumerate(variants):
            points = [(row.tokens, row.timing) for row in rows if row.variant == variant and row.timing]
            color, tokens = run_color(shown.get(variant, variant), names), [tokens for tokens, _ in points]
            drawing.axes.plot(
                tokens, [timing.p50_ms for _, timing in points], _MARKERS[index % len(_MARKERS)] + "-", color=color,
                markersize=5, label=label_of(variant),
            )  # fmt: skip
            spans = [timing.p20_ms for _, timing in points], [timing.p80_ms for _, timing in points]
            drawing.axes.fill_between(tokens, *spans, color=color, alpha=0.15, linewidth=0)
        if (crossing := crossover(rows)[0]) is not None:
            drawing.mark(crossing, f"crossover: N = {crossing:.0f}")
        sizes = {row.tokens: f"{row.height} x {row.width}\nN = {row.tokens}" for row in rows}
        drawing.logarithmic("y")
        drawing.logarithmic("x")
        drawing.axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
        drawing.axes.set_xticks(list(sizes), labels=list(sizes.values()), fontsize=8)
        unit = "map of tokens" if rows[0].level in ("core", "block") else "image, pixels"
        label = f"{unit}, height x width, with the number of tokens N"
        drawing.finish(x=label, y="latency p50, ms", left=None)
    return drawing.svg


def categories_by_difference(report: Report) -> list[str]:
    """Categories with curves of both, those first in which the deployed runs lose most at IoU 0.50."""
    curves = [
        [run.precision for run in report.runs_named(name) if run.ok and run.precision]
        for name in (report.baseline, report.deployed)
    ]
    if not all(curves):
        return []
    shared = [category for category in curves[0][0] if all(category in found for side in curves for found in side)]

    def lost(category: str) -> float:
        theirs, ours = (np.mean([found[category] for found in side]) for side in curves)
        return float(ours - theirs)

    return sorted(shared, key=lambda category: (lost(category), category))


def precision_over_recall(report: Report, category: str) -> str | None:
    """Precision of baseline and deployed runs at IoU 0.50, a line a seed, with COCO's AP at IoU 0.50."""
    with _drawing() as drawing:
        for name in unique([report.baseline, report.deployed]):
            runs = [run for run in report.runs_named(name) if run.ok]
            curves = [run.precision[category] for run in runs if category in run.precision]
            for index, curve in enumerate(curves):
                label = None if index else f"{label_of(name)}, AP50 {np.mean(curves):.3f}"
                drawing.axes.plot(
                    np.linspace(0, 1, len(curve)), curve, color=run_color(name, report.names), alpha=0.85,
                    drawstyle="steps-pre", label=label,
                )  # fmt: skip
        if drawing.axes.lines:
            drawing.axes.set(xlim=(0, 1), ylim=(0, 1.02))
            drawing.finish(x="recall, in [0, 1]", y="precision, in [0, 1]")
    return drawing.svg


def training_curve(report: Report, quantity: Literal["loss", "validation"], label: str) -> str | None:
    """A quantity over training, a line a seed. Names with the same lines, as a run and its conversion, share them."""
    shared: dict[tuple[Series, ...], list[str]] = {}
    for name in report.names:
        found = [getattr(run, quantity) for run in report.runs_named(name)]
        if lines := tuple(series for series in found if any(value is not None for value in series.values)):
            shared.setdefault(lines, []).append(name)
    with _drawing() as drawing:
        for series_of_seeds, names in shared.items():
            for index, series in enumerate(series_of_seeds):
                drawing.axes.plot(
                    *_points(series), color=run_color(names[0], report.names), alpha=0.85, markersize=3,
                    marker="o" if quantity == "validation" and len(series.steps) < 40 else None,
                    label=None if index else ", ".join(map(label_of, names)),
                )  # fmt: skip
        if shared:
            if quantity == "loss":
                drawing.logarithmic("y")
            else:
                drawing.axes.set_ylim(bottom=0)
            drawing.finish(x="training iteration", y=label)
    return drawing.svg


def mask_occupancy(run: RunRecord, quantity: Literal["kept_fraction", "kept_mass"], label: str) -> str | None:
    """What the mask of a run keeps over training, a line a layer; marks where it is empty."""
    layers: dict[str, Series] = getattr(run.mask, quantity)
    if not layers:
        return None
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    with _drawing() as drawing:
        for color, (name, series) in zip(colors, layers.items(), strict=True):
            drawing.axes.plot(*_points(series), color=color, label=label_of(name))
        drawing.axes.set_ylim(bottom=0)
        if (empty := run.mask.empty_from) is not None:
            last = max(series.steps[-1] for series in layers.values())
            drawing.mark(empty, f"empty from {empty}", right=empty <= last / 3, top=True)
        drawing.finish(x="training iteration", y=label, columns=1 + (len(layers) > 6))
    return drawing.svg


def _points(series: Series) -> tuple[Sequence[int], Sequence[float]]:
    """A value that was not finite leaves a gap in the line."""
    return series.steps, [float("nan") if value is None else value for value in series.values]


def _cost_label(report: Report) -> str:
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    return "GMACs of one image" + (" of {} x {} pixels".format(*shape) if shape else "")
