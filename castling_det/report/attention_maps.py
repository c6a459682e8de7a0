"""Where an attention layer looks: the exact weights of chosen tokens, which linear attention never forms, as a picture.

Shape suffixes as in `castling_det.ops`; R rows are those of the chosen query tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin
from torch import Tensor

from castling_det.config import network_shape
from castling_det.files import atomic_write
from castling_det.layers import HeadInputs, MaskedAttention, MaskState, attention_layers
from castling_det.ops import naive

_CAPTION_KEY = "Description"  # the PNG specification's own keyword


@dataclass(frozen=True)
class BranchWeights:
    """What both branches of a layer give to every key, before the mask; float64."""

    softmax: Tensor
    """(B, H, R, N), rows sum to 1; with position biases where the layer has them, which is in softmax mode only."""
    linear: Tensor
    """(B, H, R, N), before the normaliser. `"kernel"`: 1/2 + cos/pi. `"l2"`: cos/pi, and 1/2 at the query's place."""
    divisor: Tensor
    """(B, H, R): what the normaliser divides by, the sum of the row or the length of the row's sum of values."""


def branch_weights(
    layer: MaskedAttention, inputs: HeadInputs, hw: tuple[int, int], *, queries: Sequence[int] | None = None
) -> BranchWeights:
    """Rows of the N x N weights of both branches, from `inputs = layer.head_inputs(x, hw)`.

    `hw` is the layer's map, `queries` are indices of query tokens, prefix tokens first; None takes all.
    """
    rows = list(range(inputs.q.shape[2])) if queries is None else list(queries)
    q_BHRK, k_BHNK, v_BHNV = inputs.q[:, :, rows].detach(), inputs.k.detach(), inputs.v.detach().double()
    bias = None if inputs.bias is None else inputs.bias.detach().expand(-1, -1, inputs.q.shape[2], -1)[:, :, rows]
    softmax = naive.softmax_weights(q_BHRK, k_BHNK, bias=bias)
    linear = naive.linear_angular_weights(q_BHRK, k_BHNK)
    if layer.options.normalizer == "kernel":
        linear = linear + 0.5
        return BranchWeights(softmax, linear, linear.sum(dim=-1))
    linear = linear + 0.5 * _own_places(layer, k_BHNK.shape[2], hw, rows)
    length = torch.linalg.vector_norm(linear @ v_BHNV, dim=-1)
    return BranchWeights(softmax, linear, torch.where(length > 0, length, 1.0))  # a zero token stays zero


def _own_places(layer: MaskedAttention, num_keys: int, hw: tuple[int, int], rows: list[int]) -> Tensor:
    """(R, N): the share of each key's value in the value at a query's own place."""
    parts = [layer.values_at_queries(columns[None], hw)[0, rows] for columns in torch.eye(num_keys).split(512, dim=1)]
    return torch.cat(parts, dim=-1).double()


@dataclass(frozen=True)
class Capture:
    """A layer, and its queries, keys and values for one image.

    Two places of its map `hw` are `stride` pixels of the network's input apart. `image` is RGB as the file has it,
    `shape` its height and width at the network's input, without padding.
    """

    name: str
    layer: MaskedAttention
    inputs: HeadInputs
    hw: tuple[int, int]
    stride: int
    image: Image.Image
    shape: tuple[int, int]
    mask_note: str
    """How open the checkpoint says that its mask was, or empty."""

    def query_at(self, point: tuple[float, float]) -> tuple[int, int]:
        """Row and column, on the queries' grid, of the cell that holds a point (x, y) in pixels of the image file."""
        (x, y), (width, height) = point, self.image.size
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"point={x:g}, {y:g}: expected x in [0, {width}) and y in [0, {height}), image pixels")
        cell = self.stride * self.inputs.query_stride
        row, column = int(y * self.shape[0] / height / cell), int(x * self.shape[1] / width / cell)
        return min(row, self.inputs.query_hw[0] - 1), min(column, self.inputs.query_hw[1] - 1)


@torch.no_grad()
def capture(
    config: Any, model: Any, image: str | Path, layer: str | None = None, meta: Mapping[str, Any] | None = None
) -> Capture:
    """Runs the backbone of a model in eval mode on one image, as the config's test pipeline prepares it.

    `layer` is a name of `attention_layers`, the last by default; `meta` is the checkpoint's. ValueError for another
    layer, one that attends in windows, or an image that cannot be read.
    """
    from castling_det.conversion.mask_proof import Probes
    from castling_det.engine import META_KEY

    layers = attention_layers(model)
    name = next(reversed(layers), "") if layer is None else layer
    if name not in layers:
        known = ", ".join(layers) or "none: the backbone has no attention"
        raise ValueError(f"layer={layer!r}: expected one of {known}")
    try:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"image {image}: cannot be read: {error}") from error
    shape, seen = network_shape(config, (picture.height, picture.width)), list[Any]()
    (prepared,) = Probes((Path(image),), 1, shape).loaded(config)
    batch = model.data_preprocessor(prepared, False)["inputs"]
    handle = layers[name].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model.backbone(batch)
    handle.remove()
    x, hw = seen[0][0], (int(seen[0][1][0]), int(seen[0][1][1]))
    if x.shape[0] != 1:
        raise ValueError(f"layer={name!r}: attends in {x.shape[0]} windows, not over the map; take a global layer")
    mask, note = ((meta or {}).get(META_KEY) or {}).get("mask"), ""
    if mask is not None:
        state = "is empty" if mask.get("empty") else f"stood at {MaskState.from_meta(mask)}"
        note = f"The checkpoint's own mask {state}."
    stride = _stride(model.backbone, (batch.shape[-2], batch.shape[-1]), hw)
    return Capture(name, layers[name], layers[name].head_inputs(x, hw), hw, stride, picture, shape, note)


def _stride(backbone: Any, input_hw: tuple[int, int], hw: tuple[int, int]) -> int:
    patch_size = getattr(backbone, "patch_size", None)
    for stride in [int(patch_size)] if patch_size else [2**power for power in range(1, 9)]:
        if tuple(-(-size // stride) for size in input_hw) == hw:
            return stride
    raise ValueError(f"a map of {hw[0]} x {hw[1]} from {input_hw[0]} x {input_hw[1]} pixels: no whole stride fits")


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
    """Reads what `AttentionPicture.save` wrote; ValueError for another file."""
    try:
        with Image.open(path) as opened:
            opened.load()
            caption, image = getattr(opened, "text", {}).get(_CAPTION_KEY), opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"attention picture {path}: cannot be read as an image: {error}") from error
    if not caption:
        raise ValueError(f"attention picture {path}: has no caption in it; give a PNG of tools/attention.py")
    return AttentionPicture(image, str(caption))


class Panel(NamedTuple):
    """Weights over the keys' grid, NaN where only the image shows, and the ends of their colour scale."""

    title: str
    values: NDArray[np.float64]
    low: float
    high: float
    unit: str


def attention_picture(
    captured: Capture,
    points: Sequence[tuple[float, float]],
    *,
    head: int | None = None,
    thresholds: Sequence[float] = (),
) -> AttentionPicture:
    """Draws a row of panels for each point: the image with its token, softmax, linear-angular, and the masks.

    The token of a point (x, y), in pixels of the image file, is the query. `head=None` takes the mean over the heads.
    `thresholds` are in the layer's unit; without any, the layer's own is drawn.
    """
    inputs, num_heads = captured.inputs, captured.inputs.q.shape[1]
    if not points:
        raise ValueError("points: expected at least one (x, y), in pixels of the image")
    if head is not None and not 0 <= head < num_heads:
        raise ValueError(f"head={head}: expected 0 to {num_heads - 1}, or None for the mean over the heads")
    tokens = [captured.query_at(point) for point in points]
    queries = [inputs.num_prefix_tokens + row * inputs.query_hw[1] + column for row, column in tokens]
    weights = branch_weights(captured.layer, inputs, captured.hw, queries=queries)
    own = captured.layer.mask_state
    masks = [replace(own, threshold=threshold, ramp=0.0) for threshold in thresholds] or [own]
    panels = [_panels(captured, weights, masks, index, head) for index in range(len(tokens))]
    return AttentionPicture(_draw(captured, tokens, panels), _caption(captured, points, tokens, weights, masks, head))


def _threshold(mask: MaskState) -> str:
    return f"{mask.threshold:.3g}/N" if mask.threshold_unit == "uniform" else f"{mask.threshold:.3g}"


def _panels(
    captured: Capture, weights: BranchWeights, masks: Sequence[MaskState], index: int, head: int | None
) -> list[Panel]:
    """The panels of one token."""
    inputs, num_keys = captured.inputs, captured.inputs.k.shape[2]

    def over_heads(values_BHN: Tensor) -> NDArray[np.float64]:
        return np.asarray(values_BHN[0].mean(dim=0) if head is None else values_BHN[0, head])

    def on_map(values_BHN: Tensor) -> NDArray[np.float64]:
        return over_heads(values_BHN)[inputs.num_prefix_tokens :].reshape(inputs.key_hw)

    p_BHN, linear_BHN, divisor_BH1 = (
        x[:, :, index] for x in (weights.softmax, weights.linear, weights.divisor[..., None])
    )
    top, unit = float(on_map(p_BHN).max()), f"probability; 1/N = {1 / num_keys:.2g}"
    panels = [Panel("softmax", on_map(p_BHN), 0.0, top, unit)]
    if captured.layer.options.normalizer == "kernel":
        shown = on_map(linear_BHN / divisor_BH1)
        panels.append(Panel("linear-angular", shown, shown.min(), shown.max(), f"weight; 1/N = {1 / num_keys:.2g}"))
    else:
        shown = on_map(linear_BHN)
        # The query's own place, with 1/2 more, would take all colours.
        limit, length = float(np.percentile(np.abs(shown), 99.5)), float(over_heads(divisor_BH1)[0])
        title = f"linear-angular\nl2 norm divides by {length:.3g}"
        panels.append(Panel(title, shown, -limit, limit, "cos/pi (+ 1/2 at own place)"))
    for mask in masks:
        kept = p_BHN > mask.absolute(num_keys)
        fraction, mass = over_heads(kept.double()).mean(), over_heads(p_BHN * kept).sum()
        title = f"mask at {_threshold(mask)}\nkeeps {fraction:.1%}, mass {mass:.2f}"
        shown = on_map(p_BHN * kept)
        panels.append(Panel(title, np.where(shown > 0, shown, np.nan), 0.0, top, unit))
    return panels


def _draw(captured: Capture, tokens: Sequence[tuple[int, int]], rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Draws each row of panels after the image with its token."""
    (height, width), inches = captured.shape, 2.9
    columns = 1 + len(rows[0])
    size = (columns * inches, len(rows) * (0.83 * inches * height / width + 0.55))
    background = ImageEnhance.Brightness(ImageOps.grayscale(captured.image).convert("RGB")).enhance(0.75)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8.5, "axes.titlesize": 8.5}):
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for token, panels, line in zip(tokens, rows, axes, strict=True):
            for place, panel in zip(line, (None, *panels), strict=True):
                image = captured.image if panel is None else background
                place.imshow(image, extent=(0, width, height, 0), interpolation="lanczos", zorder=0)
                if panel is None:
                    place.set_title(f"token at row {token[0]},\ncolumn {token[1]}")
                else:
                    _draw_weights(figure, place, panel, captured.stride * captured.inputs.key_stride)
                cell = captured.stride * captured.inputs.query_stride
                for color, line_width in (("black", 3.2), ("white", 1.4)):
                    corner = (token[1] * cell, token[0] * cell)
                    place.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=color, linewidth=line_width))
                place.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        canvas.draw()  # type: ignore[no-untyped-call]
        pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels)


def _draw_weights(figure: Figure, axes: Any, panel: Panel, cell: int) -> None:
    rows, columns = panel.values.shape
    signed, high = panel.low < 0, max(panel.high, float(np.nextafter(panel.low, np.inf)))
    # A few probabilities are many times the others: by their square root all of them show.
    norm = Normalize(panel.low, high) if panel.low else PowerNorm(0.5, panel.low, high)
    extent, colors = (0, columns * cell, rows * cell, 0), "RdBu_r" if signed else "inferno"
    drawn = axes.imshow(panel.values, extent=extent, cmap=colors, norm=norm, interpolation="nearest", alpha=0.72)
    axes.set_title(panel.title)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02, extend="both" if signed else "neither")
    bar.set_label(panel.unit)
    bar.ax.tick_params(labelsize=7, length=2)


def _caption(
    captured: Capture,
    points: Sequence[tuple[float, float]],
    tokens: Sequence[tuple[int, int]],
    weights: BranchWeights,
    masks: Sequence[MaskState],
    head: int | None,
) -> str:
    layer, inputs = captured.layer, captured.inputs
    num_heads, queries, keys = inputs.q.shape[1], inputs.q.shape[2], inputs.k.shape[2]
    places = "; ".join(f"({x:g}, {y:g}) is row {row}, column {column}"
                       for (x, y), (row, column) in zip(points, tokens, strict=True))  # fmt: skip
    linear = {
        "kernel": "(1/2 + cos/pi) over the row's sum, so that a row sums to 1.",
        "l2": "cos(q, k)/pi for every key, and 1/2 more at the token's own place, before the l2 norm, which divides by "
        "the number above; blue is negative, and colours end at the 99.5th percentile.",
    }
    parts = [
        f"{captured.name}, mode {layer.mode!r}, {queries} queries on {inputs.query_hw[0]} x {inputs.query_hw[1]}, "
        f"{keys} keys on {inputs.key_hw[0]} x {inputs.key_hw[1]}, "
        + (f"mean over {num_heads} heads." if head is None else f"head {head} of {num_heads}."),
        f"The outlined token is the query: {places} of its grid.",
        f"Softmax: its probabilities over the keys, {'without' if inputs.bias is None else 'with'} position biases.",
        f"Linear-angular: {linear[layer.options.normalizer]}",
        f"Mask: the probabilities above {', '.join(map(_threshold, masks))}, in the colours of softmax; "
        "above stand the share of the keys and the probability that they hold.",
        captured.mask_note,
    ]
    if inputs.num_prefix_tokens:
        mass = float(weights.softmax[..., : inputs.num_prefix_tokens].sum(dim=-1).mean())
        parts.append(f"Not on the map: {inputs.num_prefix_tokens} prefix tokens, softmax gives them {mass:.1%}.")
    return " ".join(filter(None, parts))
