"""How a mask vanishes, as one picture: the schedules, and what a recorded training kept in each layer."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from castling_det.engine.schedules import SCHEDULES, mask_state
from castling_det.report.records import RunRecord

__all__ = ["mask_picture"]

_SIZE, _DPI = (10.5, 3.6), 110
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def mask_picture(run: RunRecord, *, start: float, end: float, empty_from: float, begin: float = 0.0) -> Image.Image:
    """Draws thresholds over progress on the left, the run's kept fraction by layer on the right.

    Args:
        run: of a castling training.
        start: threshold at the beginning, in the layers' unit.
        end: threshold that the ramps reach, in that unit.
        empty_from: progress in (0, 1) from which on the mask is empty.
        begin: progress in [0, empty_from) up to which the threshold is held.

    Raises:
        ValueError: the run logged no mask.
    """
    if not run.mask.kept_fraction:
        raise ValueError(f"run {run.name!r}: logged no mask; give a run trained with castling_det.MaskAnnealingHook")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _schedules(left, start, end, begin, empty_from)
        _occupancy(right, run)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels)


def _schedules(axes: Axes, start: float, end: float, begin: float, empty_from: float) -> None:
    progress = np.linspace(0, empty_from, 200, endpoint=False)
    for name in SCHEDULES:
        states = [
            mask_state(float(at), schedule=name, start=start, end=end, begin=begin, empty_from=empty_from)
            for at in progress
        ]
        axes.plot(progress, [state.threshold for state in states], label=name)
    axes.axvline(empty_from, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate("empty", (empty_from, 0.02), xycoords=("data", "axes fraction"), xytext=(5, 2),
                  textcoords="offset points")  # fmt: skip
    axes.set(yscale="log", xlim=(0, 1), xlabel="progress of training", ylabel="threshold, in the layer's unit")
    axes.set_title("schedules")
    axes.legend(loc="center right")


def _occupancy(axes: Axes, run: RunRecord) -> None:
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(run.mask.kept_fraction)))
    for color, (layer, series) in zip(colors, run.mask.kept_fraction.items(), strict=True):
        values = [np.nan if value is None else value for value in series.values]
        axes.plot(series.steps, values, color=color, label=layer)
    if run.mask.empty_from is not None:
        axes.axvline(run.mask.empty_from, color="black", linewidth=1, linestyle=(0, (4, 3)))
    seed = "" if run.seed is None else f", seed {run.seed}"
    axes.set(xlabel="training iteration", ylabel="kept fraction, in [0, 1]", title=f"{run.name}{seed}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
