"""What an exported ONNX file says about itself: written by `castling_det.export`, read by the runtime.

Each field is one entry `castling_det.NAME` of the file's `metadata_props`, as JSON; docs/deployment.md has the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from castling_det.runtime.preprocess import Side, Step

__all__ = ["FORMAT", "INPUT_NAME", "OUTPUT_NAMES", "PREFIX", "SIZES_NAME", "ModelMetadata"]

FORMAT = "1"
PREFIX = "castling_det."
INPUT_NAME = "images"
SIZES_NAME = "sizes"
"""A second input with a default: height and width of each image without its padding, (batch, 2), float32."""
OUTPUT_NAMES = ("boxes", "scores", "labels")
_EXPORT = "write it with tools/export_onnx.py"


@dataclass(frozen=True)
class ModelMetadata:
    """One field for each entry, in the order of the table; `format` is added when written."""

    version: str
    outputs: Literal["detections", "raw"]
    preprocessing: Literal["graph", "outside"]
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr_to_rgb: bool
    pad_size_divisor: Annotated[int, Meta(ge=1, le=1024)]
    pad_values: tuple[float, float, float]
    """What the graph turns into zeros, by channel of the input."""
    input_size: tuple[Side, Side] | None
    """Height and width of the resize, None without one."""
    keep_ratio: bool
    pipeline: Annotated[tuple[Step, ...], Meta(max_length=16)]
    score_thr: float
    nms_iou: float | None
    max_per_img: int
    opset: int
    precision: str
    attention: str
    detector: str
    source_sha256: str
    config: str
    created: str
    notes: tuple[str, ...] = ()

    def to_properties(self) -> dict[str, str]:
        """Prefixed names with JSON text, as ONNX's `metadata_props` takes them."""
        values = {"format": FORMAT, **msgspec.to_builtins(self)}
        return {PREFIX + name: json.dumps(value, ensure_ascii=False, allow_nan=False) for name, value in values.items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], where: str) -> ModelMetadata:
        """The inverse of `to_properties`; entries of others are left alone. `where` names the file in errors."""
        if f"{PREFIX}format" not in properties:
            raise ValueError(f"{where}: an ONNX file, but not one of castling_det (no {PREFIX}format in it); {_EXPORT}")
        ours = {key.removeprefix(PREFIX): text for key, text in properties.items() if key.startswith(PREFIX)}
        try:
            values = {name: msgspec.json.decode(text) for name, text in ours.items()}
            if values["format"] != FORMAT:
                raise ValueError(
                    f"{where}: format {values['format']!r:.80}: this version of castling_det reads {FORMAT!r}; "
                    f"{_EXPORT} again"
                )
            return msgspec.convert(values, cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError(f"{where}: {PREFIX}* metadata do not fit: {error!s:.200}; {_EXPORT} again") from None
