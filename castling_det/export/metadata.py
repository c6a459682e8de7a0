"""What an exported file says about itself; the table of docs/deployment.md, format 1. Needs neither torch nor onnx."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FORMAT", "INPUT_NAME", "OUTPUT_NAMES", "PREFIX", "FileMetadata"]

FORMAT = "1"
PREFIX = "castling_det."
INPUT_NAME = "images"
OUTPUT_NAMES = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class FileMetadata:
    """One field for each key of the table, in its order; `format` is added when written."""

    version: str
    outputs: str
    preprocessing: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr_to_rgb: bool
    pad_size_divisor: int
    pad_values: tuple[float, ...]
    input_size: tuple[int, int] | None
    keep_ratio: bool
    pipeline: tuple[dict[str, Any], ...]
    score_thr: float
    nms_iou: float | None
    max_per_img: int
    opset: int | None
    precision: str
    attention: str
    detector: str
    source_sha256: str
    config: str
    created: str
    notes: tuple[str, ...] = ()

    def to_properties(self) -> dict[str, str]:
        """Prefixed keys with JSON text, as ONNX's `metadata_props` and torch's extra files take them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            PREFIX + name: json.dumps(value, ensure_ascii=False, allow_nan=False)
            for name, value in {"format": FORMAT, **fields}.items()
        }

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], source: object) -> FileMetadata:
        """The inverse of `to_properties`.

        Args:
            properties: all of a file's, others among them.
            source: the file, for messages.

        Raises:
            ValueError: not our file, another format, or a field that is missing or unknown.
        """
        own = {key[len(PREFIX) :]: json.loads(text) for key, text in properties.items() if key.startswith(PREFIX)}
        written = own.pop("format", None)
        if written is None:
            raise ValueError(f"{source}: has no {PREFIX}format: not written by tools/export_onnx.py; export it again")
        if written != FORMAT:
            raise ValueError(f"{source}: {PREFIX}format={written!r}: expected {FORMAT!r}; update castling-det")
        names = {field.name for field in dataclasses.fields(cls)}
        if set(own) != names:
            missing, unknown = sorted(names - set(own)), sorted(set(own) - names)
            raise ValueError(f"{source}: metadata differ: missing {missing}, unknown {unknown}; export it again")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in own.items()
        }
        return cls(**values)
