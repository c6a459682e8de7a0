"""Draws how the mask vanishes: the schedules, and what a recorded training kept in each layer.

tools/dev/mask_picture.py results/tree_crowns/report.json castling docs/images/masks.png
    --start 1 --end 576 --begin 0.4 --empty-from 0.7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from castling_det.engine import SCHEDULES, mask_state
from castling_det.files import atomic_write
from castling_det.report.records import RunRecord, read_report

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
}


def draw_schedules(axes: Axes, *, start: float, end: float, begin: float, empty_from: float) -> None:
    """Thresholds over progress, held until `begin`, empty from `empty_from` on."""
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


def draw_occupancy(axes: Axes, run: RunRecord) -> None:
    """What the run's mask kept in each layer, over its iterations."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(run.mask.kept_fraction)))
    for color, (layer, series) in zip(colors, run.mask.kept_fraction.items(), strict=True):
        axes.plot(series.steps, np.array(series.values, float), color=color, label=layer)
    if run.mask.empty_from is not None:
        axes.axvline(run.mask.empty_from, color="black", linewidth=1, linestyle=(0, (4, 3)))
    seed = "" if run.seed is None else f", seed {run.seed}"
    axes.set(xlabel="training iteration", ylabel="kept fraction, in [0, 1]", title=f"{run.name}{seed}")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of tools/report.py")
    parser.add_argument("run", help="name of a castling run in it; the first seed with a mask is drawn")
    parser.add_argument("out", type=Path, help="picture to write, .png")
    parser.add_argument("--start", type=float, default=1.0, help="threshold at the beginning (1)")
    parser.add_argument("--end", type=float, required=True, help="threshold that the ramps reach")
    parser.add_argument("--begin", type=float, default=0.0, help="progress up to which the threshold is held (0)")
    parser.add_argument("--empty-from", type=float, required=True, help="progress from which on the mask is empty")
    args = parser.parse_args(arguments)
    runs = [run for run in read_report(args.report).runs if run.name == args.run and run.mask.kept_fraction]
    if not runs:
        print(f"error: run {args.run!r}: expected one of {args.report} that logged its mask", file=sys.stderr)
        return 1
    with matplotlib.rc_context(_STYLE), atomic_write(args.out, suffix=".png") as temporary:
        figure = Figure(figsize=(10.5, 3.6), dpi=110, layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_schedules(left, start=args.start, end=args.end, begin=args.begin, empty_from=args.empty_from)
        draw_occupancy(right, runs[0])
        figure.savefig(temporary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
