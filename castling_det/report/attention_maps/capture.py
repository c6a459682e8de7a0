"""What reaches one attention layer of a trained detector for one image, and which token lies under a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from castling_det.config import load_config, network_shape
from castling_det.layers import HeadInputs, MaskedAttention, attention_layers

__all__ = ["Capture", "capture", "load_detector", "query_at"]

_STRIDES = tuple(2**power for power in range(1, 9))


@dataclass(frozen=True)
class Capture:
    """A layer and what it attended with."""

    name: str
    """By block, such as `blocks.3`."""
    layer: MaskedAttention
    inputs: HeadInputs
    """Batch of one."""
    hw: tuple[int, int]
    """Height and width of the layer's map."""
    stride: int
    """Pixels of the network's input between two places of that map."""
    image: Image.Image
    """RGB, as the file has it."""
    shape: tuple[int, int]
    """Height and width that the network sees `image` at, in pixels, without padding."""
    mask_note: str
    """Where the mask of the checkpoint stands, or empty."""


def load_detector(config: str | Path, checkpoint: str | Path) -> tuple[Any, nn.Module, dict[str, Any]]:
    """The config, its detector with the weights of the checkpoint in eval mode, and the checkpoint's meta.

    Raises:
        ValueError: config or checkpoint that cannot be read, or that do not belong together.
    """
    from castling_det.conversion import load_checkpoint
    from castling_det.conversion.detectors import build_detector, load_weights

    loaded = load_config(config)
    model = build_detector(loaded)
    content = load_checkpoint(checkpoint)
    load_weights(model, content, checkpoint)
    meta = content.get("meta")
    return loaded, model, dict(meta) if isinstance(meta, Mapping) else {}


def capture(
    config: Any, model: nn.Module, image: str | Path, layer: str | None = None, meta: Mapping[str, Any] | None = None
) -> Capture:
    """Runs the backbone on one image as the config's test pipeline prepares it.

    Args:
        config: the detector's.
        model: in eval mode.
        image: file.
        layer: a name of `attention_layers`; None for the last.
        meta: the checkpoint's, which says where its mask stands.

    Raises:
        ValueError: no such layer, one that attends in windows, or an image that cannot be read.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            "no attention layer of castling_det in the detector's backbone; expected CastlingViT, CastlingLeViT or "
            "CastlingMViT as model.backbone"
        )
    name = list(layers)[-1] if layer is None else layer
    if name not in layers:
        raise ValueError(f"layer={name!r}: expected one of {', '.join(layers)}")
    picture = _open(Path(image))
    batch = _prepared(config, model, Path(image))
    x, hw = _input_of(layers[name], model, batch)
    if x.shape[0] != 1:
        raise ValueError(f"layer={name!r}: attends in {x.shape[0]} windows, not over the map; take a global layer")
    with torch.no_grad():
        inputs = layers[name].head_inputs(x, hw)
    input_hw = (int(batch.shape[-2]), int(batch.shape[-1]))
    return Capture(
        name=name,
        layer=layers[name],
        inputs=inputs,
        hw=hw,
        stride=_stride(model, input_hw, hw),
        image=picture,
        shape=network_shape(config, (picture.height, picture.width)),
        mask_note=_mask_note(meta or {}),
    )


def query_at(captured: Capture, point: tuple[float, float]) -> tuple[int, int]:
    """Row and column, on the queries' grid, of the cell that holds a point (x, y) in pixels of the image file.

    Raises:
        ValueError: the point is outside of the image.
    """
    x, y = point
    if not (0 <= x < captured.image.width and 0 <= y < captured.image.height):
        raise ValueError(
            f"point={x:g}, {y:g}: expected x in [0, {captured.image.width}) and y in [0, {captured.image.height}), "
            "pixels of the image file"
        )
    cell = captured.stride * captured.inputs.query_stride
    row = int(y * captured.shape[0] / captured.image.height / cell)
    column = int(x * captured.shape[1] / captured.image.width / cell)
    height, width = captured.inputs.query_hw
    return min(row, height - 1), min(column, width - 1)


def _prepared(config: Any, model: nn.Module, image: Path) -> Tensor:
    from castling_det.conversion.mask_proof import DEFAULT_SHAPE, Probes

    return next(Probes((image,), 1, DEFAULT_SHAPE).batches(config, model))[1]


def _input_of(layer: MaskedAttention, model: Any, batch: Tensor) -> tuple[Tensor, tuple[int, int]]:
    found: list[tuple[Tensor, tuple[int, int]]] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: found.append((arguments[0], tuple(arguments[1]))))
    try:
        with torch.no_grad():
            model.backbone(batch)
    finally:
        handle.remove()
    return found[0]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            picture: Image.Image = opened.convert("RGB")
            return picture
    except FileNotFoundError as error:
        raise ValueError(f"image {path}: no such file") from error
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image {path}: cannot be decoded as an image: {error}") from error


def _stride(model: Any, input_hw: tuple[int, int], hw: tuple[int, int]) -> int:
    patch = getattr(model.backbone, "patch_size", None)
    for stride in _STRIDES if patch is None else (patch,):
        if all(-(-size // stride) == cells for size, cells in zip(input_hw, hw, strict=True)):
            return int(stride)
    raise ValueError(f"a map of {hw[0]} x {hw[1]} from {input_hw[0]} x {input_hw[1]} pixels: no whole stride fits")


def _mask_note(meta: Mapping[str, Any]) -> str:
    mask = (meta.get("castling_det") or {}).get("mask")
    if not isinstance(mask, Mapping):
        return ""
    if mask.get("empty"):
        return "The checkpoint's own mask is empty: nothing of it is left in the detector."
    return f"The checkpoint's own mask stood at {mask.get('threshold'):.4g} ({mask.get('threshold_unit')})."
