"""Draws what `weights` gives: for each token, the branches' weights and the mask over the image, with colour scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from castling_det.files import atomic_write
from castling_det.report.attention_maps.capture import Capture, query_at
from castling_det.report.attention_maps.panels import Panel, TokenRow, draw
from castling_det.report.attention_maps.weights import BranchWeights, branch_weights

__all__ = ["AttentionPicture", "attention_picture", "read_picture"]

_PART = {
    "softmax": "softmax alone",
    "linear": "the linear branch alone",
    "castling": "the linear branch, and in training the mask's part of softmax",
}
"""What a layer of each mode computes with."""
_CAPTION_KEY = "Description"
"""The PNG specification's own keyword for it."""
_CLIPPED = 99.5
"""Percentile of |weight| at which the colours of `"l2"` end: the query's own place, with 1/2 more, lies beyond."""


@dataclass(frozen=True)
class AttentionPicture:
    """A picture and what it shows, in words."""

    image: Image.Image
    caption: str

    def save(self, path: str | Path) -> None:
        """Writes a PNG that holds the caption too, atomically; `read_picture` takes it back."""
        about = PngImagePlugin.PngInfo()
        about.add_itxt(_CAPTION_KEY, self.caption)
        with atomic_write(path) as temporary:
            self.image.save(temporary, format="PNG", optimize=True, pnginfo=about)


def read_picture(path: str | Path) -> AttentionPicture:
    """Reads what `AttentionPicture.save` wrote.

    Raises:
        ValueError: no PNG, or one without a caption.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            caption = getattr(opened, "text", {}).get(_CAPTION_KEY)
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"attention picture {path}: cannot be read as an image: {error}") from error
    if not caption:
        raise ValueError(f"attention picture {path}: has no caption in it; give a PNG of tools/attention.py")
    return AttentionPicture(image, str(caption))


def attention_picture(
    captured: Capture,
    points: Sequence[tuple[float, float]],
    *,
    head: int | None = None,
    thresholds: Sequence[float] = (),
) -> AttentionPicture:
    """A row of panels a point: the image with its token, softmax, linear-angular, and the mask at each threshold.

    Args:
        captured: layer and image.
        points: (x, y) in pixels of the image file, one or more; the tokens that hold them ask.
        head: index of a head; None for the mean over the heads.
        thresholds: of the mask, in the layer's unit; none takes where the layer's mask stands.

    Raises:
        ValueError: no point, one outside of the image, or no such head.
    """
    layer, inputs = captured.layer, captured.inputs
    if not points:
        raise ValueError("points: expected at least one (x, y), in pixels of the image")
    num_heads = inputs.q.shape[1]
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"head={head}: expected 0 to {num_heads - 1}, or None for the mean over the heads")
    tokens = [query_at(captured, point) for point in points]
    rows = [inputs.num_prefix_tokens + row * inputs.query_hw[1] + column for row, column in tokens]
    limits = list(thresholds) or [layer.mask_state.threshold]
    weights = [branch_weights(layer, inputs, captured.hw, queries=rows, threshold=threshold) for threshold in limits]
    drawn = [TokenRow(token, _panels(captured, weights, limits, index, head)) for index, token in enumerate(tokens)]
    return AttentionPicture(draw(captured, drawn), _caption(captured, points, tokens, weights, limits, head))


def _panels(
    captured: Capture, weights: Sequence[BranchWeights], limits: Sequence[float], index: int, head: int | None
) -> list[Panel]:
    """Of one token: softmax, linear, masks."""
    inputs, uniform = captured.inputs, 1 / captured.inputs.k.shape[2]

    def on_map(values_BHRN: Tensor) -> NDArray[np.float64]:
        row = _over_heads(values_BHRN[:, :, index], head)[inputs.num_prefix_tokens :]
        return row.reshape(inputs.key_hw)

    softmax = on_map(weights[0].softmax)
    top = float(softmax.max())
    probability = f"probability; 1/N = {uniform:.2g}"
    linear = _linear_panel(captured, weights[0], on_map, index, head)
    panels = [Panel("softmax", softmax, 0.0, top, probability), linear]
    for each, limit in zip(weights, limits, strict=True):
        fraction, mass = (
            float(_over_heads(values[:, :, index, None], head)[0]) for values in (each.kept_fraction, each.kept_mass)
        )
        title = f"mask at {_threshold_text(captured, limit)}\nkeeps {fraction:.1%}, mass {mass:.2f}"
        kept = on_map(each.kept)
        panels.append(Panel(title, np.where(kept > 0, kept, np.nan), 0.0, top, probability))
    return panels


def _linear_panel(
    captured: Capture,
    weights: BranchWeights,
    on_map: Callable[[Tensor], NDArray[np.float64]],
    index: int,
    head: int | None,
) -> Panel:
    if captured.layer.options.normalizer == "kernel":
        shown = on_map(weights.linear / weights.divisor.unsqueeze(-1))
        label = f"weight; 1/N = {1 / captured.inputs.k.shape[2]:.2g}"
        return Panel("linear-angular", shown, float(shown.min()), float(shown.max()), label)
    shown = on_map(weights.linear)
    limit = float(np.percentile(np.abs(shown), _CLIPPED))
    divisor = float(_over_heads(weights.divisor[:, :, index, None], head)[0])
    title = f"linear-angular\nl2 norm divides by {divisor:.3g}"
    return Panel(title, shown, -limit, limit, "cos/pi (+ 1/2 at own place)", signed=True)


def _over_heads(values_BH1N: Tensor, head: int | None) -> NDArray[np.float64]:
    """One head's row, or the mean over the heads."""
    chosen = values_BH1N[0].mean(dim=0) if head is None else values_BH1N[0, head]
    row: NDArray[np.float64] = chosen.numpy()
    return row


def _threshold_text(captured: Capture, threshold: float) -> str:
    return f"{threshold:.3g}/N" if captured.layer.mask_state.threshold_unit == "uniform" else f"{threshold:.3g}"


def _caption(
    captured: Capture,
    points: Sequence[tuple[float, float]],
    tokens: Sequence[tuple[int, int]],
    weights: Sequence[BranchWeights],
    limits: Sequence[float],
    head: int | None,
) -> str:
    layer, inputs = captured.layer, captured.inputs
    num_heads, queries, keys = inputs.q.shape[1], inputs.q.shape[2], inputs.k.shape[2]
    heads = f"mean over {num_heads} heads" if head is None else f"head {head} of {num_heads}"
    places = "; ".join(
        f"({x:g}, {y:g}) is row {row}, column {column}" for (x, y), (row, column) in zip(points, tokens, strict=True)
    )
    parts = [
        f"{captured.name}, mode {layer.mode!r}, {queries} queries on {inputs.query_hw[0]} x {inputs.query_hw[1]}, "
        f"{keys} keys on {inputs.key_hw[0]} x {inputs.key_hw[1]}, {heads}.",
        f"This layer computes with {_PART[layer.mode]}.",
        f"The outlined token asks: {places} of its grid.",
        "Softmax: its probabilities over the keys"
        + (", position biases included." if inputs.bias is not None else ", q k^T / sqrt(K) without positions."),
        _linear_words(captured),
        f"Mask: the probabilities above {', '.join(_threshold_text(captured, limit) for limit in limits)}, in the "
        "colours of softmax; the share of the row's keys and the probability that they hold stand above.",
        captured.mask_note,
    ]
    if inputs.num_prefix_tokens:
        mass = weights[0].softmax[..., : inputs.num_prefix_tokens].sum(dim=-1).mean()
        parts.append(f"Not on the map: {inputs.num_prefix_tokens} prefix tokens, softmax gives them {float(mass):.1%}.")
    return " ".join(part for part in parts if part)


def _linear_words(captured: Capture) -> str:
    if captured.layer.options.normalizer == "kernel":
        return (
            "Linear-angular: (1/2 + cos/pi) over the row's sum, so that a row sums to 1; colours go from its smallest "
            "to its largest weight."
        )
    return (
        "Linear-angular: cos(q, k)/pi for every key, and 1/2 more at the token's own place, before the l2 norm, which "
        f"divides the row by the number above; colours end at the {_CLIPPED:g}th percentile, blue is negative."
    )
