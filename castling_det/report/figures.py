"""The plots and photographs of a report.

Each plot is an SVG drawing of its own, or None where the runs have nothing to draw. Photographs are of the images on
which two detectors differ most: ground truth, baseline and deployed boxes side by side.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageDraw

from castling_det.report.evaluation import Annotations, Box, Found
from castling_det.report.records import (
    Comparison,
    ImageComparison,
    Report,
    RunRecord,
    Series,
    printable,
    summaries,
    unique,
)

BOXES = {"truth": "#ffffff", "right": "#4cc3ff", "wrong": "#ff7f0e", "missed": "#fff200"}
"""Colours on photographs: annotated, found rightly, found wrongly, missed."""

_SIDE = 512  # pixels of a picture's longer side, at least: lines stay thin beside the objects of enlarged tiles
_MARGIN = 8  # pixels outside of a picture in which boxes are drawn: their lines do not show

# Okabe and Ito's palette, safe for the colour-blind, in an order in which neighbours differ in lightness too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4a86", "#7a6a00", "#4d4d4d")
_MARKERS = ("o", "s", "D", "^", "v", "P")
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
_styled = matplotlib.rc_context(_STYLE)


class Row(NamedTuple):
    """One image of the gallery as three pictures of equal size."""

    image: ImageComparison
    truth: Image.Image
    baseline: Image.Image
    deployed: Image.Image


def _new_axes() -> Any:
    # A figure of its own, outside of pyplot: no global state, nothing to close, no display.
    return Figure(figsize=(5.2, 3.5), layout="constrained").add_subplot()


def _svg(axes: Any, *, x: str, y: str, columns: int = 1, from_zero: bool = True) -> str:
    """Names the axes, explains the lines, and gives the drawing as a file."""
    axes.set(xlabel=x, ylabel=y)
    if from_zero:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer="iteration" in x))
        axes.set_xlim(left=0)
    axes.legend(loc="best", ncols=columns, handlelength=1.6)
    buffer = io.StringIO()
    axes.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def _lines(axes: Any, curves: Iterable[Series | Sequence[float]], label: str, **style: Any) -> None:
    """Lines of one name and style. Values that were not finite are gaps; plain numbers are spread over [0, 1]."""
    for index, curve in enumerate(curves):
        x, y = (curve.steps, curve.values) if isinstance(curve, Series) else (np.linspace(0, 1, len(curve)), curve)
        axes.plot(x, np.array(y, dtype=float), label=None if index else label, **style)


def run_color(name: str, names: Sequence[str]) -> str:
    """The colour of a run, in every plot and table; runs past the sixth begin again."""
    return COLORS[list(names).index(name) % len(COLORS)]


def label_of(text: str) -> str:
    """A name as matplotlib and an SVG file can show it: printable, not too long, no "_" in front, which hides it."""
    shown = printable(text.replace("\n", " "))
    shown = shown if len(shown) <= 48 else f"{shown[:47]}\N{HORIZONTAL ELLIPSIS}"
    return f" {shown}" if shown.startswith("_") else shown


@_styled
def accuracy_over(report: Report, cost: Literal["gmacs", "latency"]) -> str | None:
    """mAP over multiply-adds or median latency: a small mark a seed, a large one the mean."""
    axes, costs = _new_axes(), list[float]()
    for index, summary in enumerate(summaries(report)):
        runs = [run for run in summary.runs if run.ok]
        spent = [run.gmacs if cost == "gmacs" else run.latency and run.latency.p50_ms for run in runs]
        pairs = zip(spent, (run.metrics.get("mAP") for run in runs), strict=True)
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        if not points:
            continue
        x, y = np.array(points, dtype=float).T
        color, marker = run_color(summary.name, report.names), _MARKERS[index % len(_MARKERS)]
        axes.plot(x, y, marker, color=color, markersize=4, alpha=0.55, markeredgewidth=0)
        # Runs of equal cost and accuracy lie on one another: later ones are smaller, and rings.
        axes.plot(
            x.mean(), y.mean(), marker, color=color, markersize=13 - 3 * (len(costs) % 3), markerfacecolor="none",
            markeredgewidth=2.2, label=label_of(summary.name),
        )  # fmt: skip
        costs.append(float(x.max()))
    if not costs:
        return None
    axes.set_xlim(right=1.12 * max(costs))
    axes.margins(y=0.25)
    label = _cost_label(report) if cost == "gmacs" else "latency of one image, p50, ms"
    return _svg(axes, x=label, y="mAP, in [0, 1]")


@_styled
def cost_by_kind(report: Report) -> str | None:
    """GMACs by kind, a bar for the baseline and one for the deployed run; None unless both are known."""
    runs = [summary.first for summary in summaries(report) if summary.name in (report.baseline, report.deployed)]
    if len(runs) < 2 or not all(run.gmacs_by_kind for run in runs):
        return None
    kinds = sorted({kind for run in runs for kind in run.gmacs_by_kind})
    kinds.sort(key=lambda kind: max(run.gmacs_by_kind.get(kind, 0.0) for run in runs))
    axes = _new_axes()
    for index, run in enumerate(runs):
        places = [place + (0.5 - index) * 0.38 for place in range(len(kinds))]
        values = [run.gmacs_by_kind.get(kind, 0.0) for kind in kinds]
        bars = axes.barh(places, values, 0.38, color=run_color(run.name, report.names), label=label_of(run.name))
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(kinds)), [label_of(kind.replace("_", " ")) for kind in kinds])
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    return _svg(axes, x=_cost_label(report), y="")


def categories_by_difference(report: Report) -> list[str]:
    """Categories with curves of both, those first in which the deployed runs lose most at IoU 0.50."""
    theirs, ours = (
        [run.precision for run in report.runs_named(name) if run.ok and run.precision]
        for name in (report.baseline, report.deployed)
    )
    if not theirs or not ours:
        return []
    shared = [category for category in theirs[0] if all(category in found for found in theirs + ours)]

    def gained(category: str) -> float:
        return float(np.mean([run[category] for run in ours]) - np.mean([run[category] for run in theirs]))

    return sorted(shared, key=lambda category: (gained(category), category))


@_styled
def precision_over_recall(report: Report, category: str) -> str | None:
    """Precision of baseline and deployed runs at IoU 0.50, a line a seed, with COCO's AP at IoU 0.50."""
    axes = _new_axes()
    for name in unique([report.baseline, report.deployed]):
        curves = [run.precision[category] for run in report.runs_named(name) if run.ok and category in run.precision]
        label = f"{label_of(name)}, AP50 {np.mean(curves):.3f}"
        _lines(axes, curves, label, color=run_color(name, report.names), alpha=0.85, drawstyle="steps-pre")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return _svg(axes, x="recall, in [0, 1]", y="precision, in [0, 1]")


@_styled
def training_curve(report: Report, quantity: Literal["loss", "validation"], label: str) -> str | None:
    """A quantity over training, a line a seed. Names with the same lines, as a run and its conversion, share them."""
    shared: dict[tuple[Series, ...], list[str]] = {}
    for name in report.names:
        found = [getattr(run, quantity) for run in report.runs_named(name)]
        if lines := tuple(series for series in found if any(value is not None for value in series.values)):
            shared.setdefault(lines, []).append(name)
    if not shared:
        return None
    axes = _new_axes()
    for lines, names in shared.items():
        color, marker = run_color(names[0], report.names), "o" if quantity == "validation" else None
        _lines(axes, lines, ", ".join(map(label_of, names)), color=color, alpha=0.85, markersize=3, marker=marker)
    if quantity == "loss":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    return _svg(axes, x="training iteration", y=label)


@_styled
def mask_occupancy(run: RunRecord, quantity: Literal["kept_fraction", "kept_mass"], label: str) -> str | None:
    """What the mask of a run keeps over training, a line a layer; marks where it is empty."""
    layers: dict[str, Series] = getattr(run.mask, quantity)
    if not layers:
        return None
    axes = _new_axes()
    for color, (name, series) in zip(np.linspace(0, 0.9, len(layers)), layers.items(), strict=True):
        _lines(axes, [series], label_of(name), color=matplotlib.colormaps["viridis"](color))
    axes.set_ylim(bottom=0)
    if (empty := run.mask.empty_from) is not None:
        right = empty <= max(series.steps[-1] for series in layers.values()) / 3
        axes.axvline(empty, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"empty from {empty}", (empty, 0.97), xycoords=("data", "axes fraction"), textcoords="offset points",
            xytext=(5 if right else -5, 0), ha="left" if right else "right", va="top",
        )  # fmt: skip
    return _svg(axes, x="training iteration", y=label, columns=1 + (len(layers) > 6))


def _cost_label(report: Report) -> str:
    shape = next((run.input_shape for run in report.runs if run.input_shape is not None), None)
    return "GMACs of one image" + (" of {} x {} pixels".format(*shape) if shape else "")


def gallery(
    comparison: Comparison, annotations: Annotations, images: Path, found: Sequence[Mapping[int, Found]], count: int
) -> list[Row]:
    """Draws the first `count` images of a comparison with the boxes of baseline and deployed detector.

    ValueError names a file that is missing, outside of the folder `images` or cannot be decoded.
    """
    rows = []
    for image in comparison.images[:count]:
        picture, scale = _load(images, image.file_name)
        truth = picture.copy()
        for row in annotations.document["annotations"]:
            if row["image_id"] == image.image_id:
                crowd = bool(row.get("iscrowd"))
                _outline(truth, row["bbox"], scale, BOXES["truth"], dashed=crowd, width=1 if crowd else 3)
        rows.append(Row(image, truth, *(_draw(picture, boxes.get(image.image_id, Found()), scale) for boxes in found)))
    return rows


def _load(folder: Path, name: str) -> tuple[Image.Image, float]:
    """The image in RGB, its longer side brought to 512 to 1024 pixels, and the factor."""
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"file_name={name!r}: expected a path inside of --images {folder}; a report shows no others")
    path = folder / name
    if not os.path.isfile(path):
        problem = "not a regular file" if os.path.exists(path) else "no such image"
        raise ValueError(f"{path}: {problem}; give the folder of the tested images as --images")
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be decoded as an image: {error}") from error
    longer = max(picture.size)
    scale = _SIDE / longer if longer < _SIDE else min(1.0, 2 * _SIDE / longer)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.LANCZOS), scale


def _draw(picture: Image.Image, found: Found, scale: float) -> Image.Image:
    drawn = picture.copy()
    for kind, boxes in (("missed", found.missed), ("right", found.right), ("wrong", found.wrong)):
        for box in boxes:
            _outline(drawn, box, scale, BOXES[kind], dashed=kind == "missed")
    return drawn


def _outline(picture: Image.Image, box: Box, scale: float, color: str, *, dashed: bool = False, width: int = 3) -> None:
    """A line on a dark one that is wider, so that it shows on any photograph."""
    draw = ImageDraw.Draw(picture)
    x, y, box_width, box_height = (value * scale for value in box)
    # However large a box is, no more of it is drawn than the picture can show.
    x0, x1 = np.clip([x, x + box_width], -_MARGIN, picture.width + _MARGIN).tolist()
    y0, y1 = np.clip([y, y + box_height], -_MARGIN, picture.height + _MARGIN).tolist()
    for (ax, ay), (bx, by) in pairwise([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]):
        length = max(abs(bx - ax), abs(by - ay), 1.0)
        dash = 7.0 if dashed else length
        for step in range(math.ceil(length / (2 * dash))):
            start, end = 2 * dash * step, min(2 * dash * step + dash, length)
            line = [(ax + (bx - ax) * part / length, ay + (by - ay) * part / length) for part in (start, end)]
            draw.line(line, fill="#101010", width=width + 2)
            draw.line(line, fill=color, width=width)
