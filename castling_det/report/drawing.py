"""What all plots of a report share: inline SVG in the page's own font and colour, no frame around the data."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from castling_det.report.colors import FOREGROUND, as_css_variables

__all__ = ["MARKERS", "finish", "new_figure", "svg_of"]

_SIZE = (5.2, 3.5)
MARKERS = ("o", "s", "D", "^", "v", "P")
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


@contextmanager
def new_figure() -> Iterator[tuple[Figure, Axes]]:
    # A figure of its own, outside of pyplot: no global state, nothing to close, no display.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        yield figure, axes


def svg_of(figure: Figure, description: str) -> str:
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


def finish(axes: Axes, *, x: str, y: str, legend: bool, columns: int = 1) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer="iteration" in x))
    axes.set_xlim(left=0)
    axes.tick_params(length=3, width=0.7)
    if legend:
        axes.legend(loc="best", ncols=columns, handlelength=1.6)
