"""Colours of a report: one a run, the same in every plot and table, safe for the colour-blind, in light and dark.

Plots are drawn with stand-in colours; the page's style sheet gives each its value for light and for dark.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BOXES", "FOREGROUND", "LAYERS", "as_css_variables", "layer_color", "run_color", "style_sheet"]

# Okabe and Ito's palette, in an order in which neighbours differ in lightness too; a lighter twin for dark pages.
_RUNS = (
    ("#0072b2", "#5bb4f0"),
    ("#d55e00", "#ff9447"),
    ("#009e73", "#3fd0a4"),
    ("#aa4a86", "#e59bc9"),
    ("#7a6a00", "#f0d94a"),
    ("#4d4d4d", "#b8b8b8"),
)

FOREGROUND = "#010101"
"""Stand-in for the page's text colour."""

LAYERS = 8
"""Steps of the ramp from the first layer to the last."""

# Ends of the ramp in light and dark: hue and lightness both move, so that it reads in grey as well.
_RAMP = (
    ((0x44, 0x01, 0x54), (0x21, 0x91, 0x8C), (0xC2, 0x9B, 0x00)),
    ((0xB0, 0x8C, 0xF0), (0x3C, 0xB8, 0xB0), (0xFD, 0xE7, 0x25)),
)

BOXES = {"truth": "#ffffff", "right": "#4cc3ff", "wrong": "#ff7f0e", "missed": "#fff200"}
"""Boxes drawn on photographs: annotated, found rightly, found wrongly, missed."""


def run_color(name: str, names: Sequence[str]) -> str:
    """The stand-in colour of a run; runs past the sixth begin again."""
    return f"#01010{2 + list(names).index(name) % len(_RUNS)}"


def layer_color(index: int, count: int) -> str:
    """The stand-in colour of layer `index` of `count`, along a ramp from the first to the last."""
    return f"#01011{round(index * (LAYERS - 1) / max(count - 1, 1))}"


def as_css_variables(svg: str) -> str:
    """Replaces the stand-in colours in a drawing."""
    for run in range(len(_RUNS)):
        svg = svg.replace(f"#01010{2 + run}", f"var(--run-{run})")
    for step in range(LAYERS):
        svg = svg.replace(f"#01011{step}", f"var(--layer-{step})")
    return svg.replace(FOREGROUND, "currentColor")


def style_sheet(dark: bool) -> str:
    """The declarations of the variables for a light or a dark page."""
    runs = [f"--run-{index}: {pair[dark]};" for index, pair in enumerate(_RUNS)]
    layers = [f"--layer-{step}: {_ramp(step / (LAYERS - 1), dark)};" for step in range(LAYERS)]
    return " ".join(runs + layers)


def _ramp(position: float, dark: bool) -> str:
    low, middle, high = _RAMP[dark]
    start, end, part = (low, middle, 2 * position) if position < 0.5 else (middle, high, 2 * position - 1)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(start, end, strict=True))
