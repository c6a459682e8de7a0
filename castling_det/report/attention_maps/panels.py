"""Panels of weights over a darkened image, one row of them a token, each with its colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from castling_det.report.attention_maps.capture import Capture

__all__ = ["Panel", "TokenRow", "draw"]

_PANEL_INCHES = 2.9
_TITLE_INCHES = 0.55
_BAR_SHARE = 0.17
"""Of a panel's width, what the colour scale takes."""
_DPI = 110
_OPACITY = 0.72
_STYLE: dict[Any, Any] = {"font.family": "sans-serif", "font.size": 8.5, "axes.titlesize": 8.5}


@dataclass(frozen=True)
class Panel:
    """A map of weights."""

    title: str
    values: NDArray[np.float64]
    """(rows, columns) of the keys' grid; NaN shows the image alone."""
    low: float
    high: float
    """Ends of the colour scale; what lies beyond has the end's colour. From 0 on, colours go by the square root."""
    unit: str
    """Name of the colour scale, with its unit."""
    signed: bool = False
    """Diverging colours around 0."""


@dataclass(frozen=True)
class TokenRow:
    """A query token, as (row, column) of the queries' grid, and its panels."""

    token: tuple[int, int]
    panels: Sequence[Panel]


def draw(captured: Capture, rows: Sequence[TokenRow]) -> Image.Image:
    """All rows; the first picture of each is the image itself with its token."""
    height, width = captured.shape
    columns = 1 + len(rows[0].panels)
    side = _PANEL_INCHES * (1 - _BAR_SHARE)
    size = (columns * _PANEL_INCHES, len(rows) * (side * height / width + _TITLE_INCHES))
    background = ImageEnhance.Brightness(ImageOps.grayscale(captured.image).convert("RGB")).enhance(0.75)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for row, line in zip(rows, axes, strict=True):
            _frame(line[0], captured, captured.image, row.token)
            line[0].set_title(f"token at row {row.token[0]},\ncolumn {row.token[1]}")
            for panel, place in zip(row.panels, line[1:], strict=True):
                _frame(place, captured, background, row.token)
                _weights(figure, place, captured, panel)
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels)


def _frame(axes: Axes, captured: Capture, image: Image.Image, token: tuple[int, int]) -> None:
    """The image in pixels of the network's input, and the token's cell."""
    height, width = captured.shape
    axes.imshow(image, extent=(0, width, height, 0), interpolation="lanczos", zorder=0)
    cell = captured.stride * captured.inputs.query_stride
    corner = (token[1] * cell, token[0] * cell)
    axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="black", linewidth=3.2, zorder=3))
    axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="white", linewidth=1.4, zorder=4))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([])
    axes.set_yticks([])


def _weights(figure: Figure, axes: Axes, captured: Capture, panel: Panel) -> None:
    cell = captured.stride * captured.inputs.key_stride
    rows, columns = panel.values.shape
    high = max(panel.high, float(np.nextafter(panel.low, np.inf)))
    drawn = axes.imshow(
        panel.values,
        extent=(0, columns * cell, rows * cell, 0),
        cmap="RdBu_r" if panel.signed else "inferno",
        # A few probabilities are many times the others: by their square root all of them show.
        norm=Normalize(panel.low, high) if panel.low else PowerNorm(0.5, panel.low, high),
        interpolation="nearest",
        alpha=_OPACITY,
        zorder=1,
    )
    # imshow has moved the limits to the padded map.
    axes.set_xlim(0, captured.shape[1])
    axes.set_ylim(captured.shape[0], 0)
    axes.set_title(panel.title)
    beyond = "both" if panel.signed else "neither"
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02, extend=beyond)
    bar.set_label(panel.unit)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
