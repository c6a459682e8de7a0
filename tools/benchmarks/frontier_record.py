"""The record, tables and figure of docs/frontier.md, from what tools/frontier.py measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.report.records import Machine, read_json
from castling_det.report.render import markdown_table

Floats = NDArray[np.float64]
Key = tuple[str, int, int]
"""Attention, size of page, seed."""
LABELS = {"castling": "castling, deployed", "softmax": "softmax", "softmax-window": "windows", "linear": "linear"}


@dataclass(frozen=True)
class Curve:
    """One attention: by size of page, ascending, what a page costs, and the mAP with its draws."""

    costs: tuple[float, ...]
    values: Floats
    """mAP, (sizes, 1 + draws): of all pages, then of each draw, averaged over seeds."""

    def at(self, cost: float) -> Floats:
        """mAP (1 + draws,) at a cost, linear over its logarithm; beyond the largest size, that of the largest.

        NaN below the smallest size.
        """
        if cost < self.costs[0]:
            return np.full(self.values.shape[1], np.nan)
        upper = int(np.searchsorted(self.costs, cost))
        if upper == len(self.costs) or self.costs[upper] == cost:
            return self.values[min(upper, len(self.costs) - 1)]
        low, high = np.log(self.costs[upper - 1]), np.log(self.costs[upper])
        share = (np.log(cost) - low) / (high - low)
        return np.asarray((1 - share) * self.values[upper - 1] + share * self.values[upper])


@dataclass(frozen=True)
class Gain:
    """mAP of `ours` minus that of `theirs` at one cost, with its interval of 95%."""

    ours: str
    theirs: str
    at: str
    """What is equal, such as `latency of softmax at 640`."""
    cost: float
    value: float
    low: float
    high: float
    seeds: tuple[int, ...]


def gain(ours: Floats, theirs: Floats) -> tuple[float, float, float]:
    """The difference of two mAPs (1 + draws,) and its central interval of 95%."""
    difference = ours - theirs
    low, high = np.nanquantile(difference[1:], [0.025, 0.975])
    return float(difference[0]), float(low), float(high)


@dataclass(frozen=True)
class Row:
    """One trained detector. Latency and memory are measured for seed 0."""

    attention: str
    size: int
    seed: int
    map: float
    """COCO's, in [0, 1]."""
    map50: float
    gmacs: float
    training_minutes: float
    onnx_sha256: str
    p50_ms: float | None = None
    rounds_p50_ms: tuple[float, ...] = ()
    peak_mib: float | None = None


@dataclass(frozen=True)
class Way:
    """How large sheets are read: in one pass, or in tiles."""

    way: str
    map: float
    seconds: float
    """Median of a sheet."""
    duplicates: float
    """A sheet: boxes that overlap one of their class with a higher score by more than half of the smaller."""


@dataclass(frozen=True)
class Record:
    """All that docs/frontier.md shows."""

    command: str
    machine: Machine
    sentinel_ms: tuple[float, ...]
    pages: int
    boxes: int
    rows: tuple[Row, ...]
    gains: tuple[Gain, ...]
    sheets: tuple[Way, ...]


def curve(rows: Sequence[Row], values: Mapping[Key, Floats], attention: str, cost: str) -> Curve:
    """The curve of an attention over a cost, a field of `Row`; seeds of one size are averaged."""
    by_size = defaultdict(list)
    for row in rows:
        if row.attention == attention:
            by_size[row.size].append(row)
    first = [next(row for row in by_size[size] if row.seed == 0) for size in sorted(by_size)]
    means = [np.mean([values[attention, row.size, one.seed] for one in by_size[row.size]], axis=0) for row in first]
    return Curve(tuple(float(getattr(row, cost)) for row in first), np.stack(means))


def gains_of(rows: Sequence[Row], values: Mapping[Key, Floats], compared: Sequence[int]) -> tuple[Gain, ...]:
    """The comparisons of the protocol, at the cost of softmax at the sizes `compared`, and at equal size.

    `values` are the mAP and its draws (1 + draws,) of each row.
    """
    found = []
    row_of = {(row.attention, row.size, row.seed): row for row in rows}
    seeds = tuple(sorted({row.seed for row in rows}))
    largest = max(row.size for row in rows if row.attention == "castling")

    def add(theirs: str, at: str, cost: float, pair: tuple[Floats, Floats], which: tuple[int, ...]) -> None:
        found.append(Gain("castling", theirs, at, cost, *gain(*pair), which))

    attentions = {row.attention for row in rows}
    for cost, name in (("p50_ms", "latency"), ("gmacs", "multiply-adds")):
        ours = curve(rows, values, "castling", cost)
        for size in compared:
            at = float(getattr(row_of["softmax", size, 0], cost))
            theirs = np.mean([values["softmax", size, seed] for seed in seeds], axis=0)
            add("softmax", f"{name} of softmax at {size}", at, (ours.at(at), theirs), seeds)
        if "softmax-window" in attentions:
            at = ours.costs[-1]
            pair = values["castling", largest, 0], curve(rows, values, "softmax-window", cost).at(at)
            add("softmax-window", f"{name} of castling at {largest}", at, pair, (0,))
    for theirs_name, size in sorted({(row.attention, row.size) for row in rows} - {("castling", largest)}):
        which = tuple(s for s in seeds if all((one, size, s) in values for one in ("castling", theirs_name)))
        if theirs_name in ("softmax", "linear") and which:
            mine, other = (np.mean([values[one, size, s] for s in which], axis=0) for one in ("castling", theirs_name))
            add(theirs_name, f"image of {size} pixels", float(size), (mine, other), which)
    return tuple(found)


def duplicates(results: Sequence[Mapping[str, Any]]) -> int:
    """Boxes that overlap one of their image and class with a higher score by more than half of the smaller one."""
    from supervision import OverlapMetric, box_iou_batch, xywh_to_xyxy

    groups: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for row in sorted(results, key=lambda row: -float(row["score"])):
        groups[row["image_id"], row["category_id"]].append(row["bbox"])
    count = 0
    for boxes in groups.values():
        corners = xywh_to_xyxy(np.array(boxes, dtype=float))
        share = box_iou_batch(corners, corners, OverlapMetric.IOS)
        count += int((np.tril(share, -1) > 0.5).any(axis=1).sum())
    return count


def figure(record: Record, out: Path) -> None:
    """mAP over latency and over multiply-adds, one line an attention, each point with its size of page."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    from castling_det.report.figures import COLORS

    drawing = Figure(figsize=(9, 3.8), layout="constrained")
    panels = (("p50_ms", "latency of an image, ms, two CPU threads"), ("gmacs", "multiply-adds of an image, 10⁹"))
    for place, (cost, label) in enumerate(panels, start=1):
        axes = drawing.add_subplot(1, 2, place)
        for color, (attention, name) in zip(COLORS, LABELS.items(), strict=False):
            mine = [row for row in record.rows if row.attention == attention]
            if not mine:
                continue
            first = sorted((row for row in mine if row.seed == 0), key=lambda row: row.size)
            x = [float(getattr(row, cost)) for row in first]
            y = [100 * float(np.mean([one.map for one in mine if one.size == row.size])) for row in first]
            linear = attention in ("castling", "linear")
            axes.plot(x, y, "o:" if attention == "linear" else "o-", color=color, label=name, ms=4.5, lw=1.6)
            style: dict[str, Any] = {"fontsize": 7, "color": color, "textcoords": "offset points"}
            for row, place_x, place_y in zip(first, x, y, strict=True):
                offset, side = ((-4, 5), "right") if linear else ((4, -10), "left")
                axes.annotate(str(row.size), (place_x, place_y), offset, ha=side, **style)
        axes.set(xscale="log", xlabel=label, ylabel="mAP")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(out, dpi=130)


def read_record(path: Path) -> Record:
    """Reads what tools/frontier.py wrote; ValueError where it does not fit."""
    return read_json(path, Record, "a record of tools/frontier.py")


def detectors_markdown(record: Record) -> str:
    """A row for each attention and size."""
    head = ["attention", "pixels", "seeds", "mAP", "mAP50", "GMACs", "ms, p50", "MiB, peak", "training, minutes"]
    body = []
    for attention, size in dict.fromkeys((row.attention, row.size) for row in sorted(record.rows, key=_order)):
        mine = [row for row in record.rows if (row.attention, row.size) == (attention, size)]
        first = min(mine, key=lambda row: row.seed)
        maps = [100 * row.map for row in mine]
        spread = f" ± {np.std(maps, ddof=1):.1f}" if len(maps) > 1 else ""
        timed = ["", ""] if first.p50_ms is None else [f"{first.p50_ms:.0f}", f"{first.peak_mib:.0f}"]
        minutes = f"{np.mean([row.training_minutes for row in mine]):.0f}"
        figures = [f"{np.mean(maps):.1f}{spread}", f"{100 * np.mean([row.map50 for row in mine]):.1f}"]
        body.append(
            [
                LABELS.get(attention, attention),
                str(size),
                str(len(mine)),
                *figures,
                f"{first.gmacs:.2f}",
                *timed,
                minutes,
            ]
        )
    return "\n".join(markdown_table(head, body))


def gains_markdown(record: Record) -> str:
    """A row for each comparison, in points of mAP."""
    head = ["castling, deployed, minus", "at equal", "mAP", "95%", "seeds"]
    body = [
        [
            LABELS[row.theirs],
            row.at,
            f"{100 * row.value:+.1f}",
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            str(len(row.seeds)),
        ]
        for row in record.gains
    ]
    return "\n".join(markdown_table(head, body))


def sheets_markdown(record: Record) -> str:
    """One pass and tiles."""
    head = ["sheets of 1,490 x 2,048 pixels", "mAP", "seconds a sheet", "duplicates a sheet"]
    body = [[row.way, f"{100 * row.map:.1f}", f"{row.seconds:.2f}", f"{row.duplicates:.1f}"] for row in record.sheets]
    return "\n".join(markdown_table(head, body))


def _order(row: Row) -> tuple[int, int]:
    names = list(LABELS)
    return (names.index(row.attention) if row.attention in names else len(names), row.size)
