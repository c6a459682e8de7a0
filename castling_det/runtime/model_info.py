"""What an exported ONNX file says of itself; docs/deployment.md has the format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from castling_det.runtime.preprocess import STEPS

__all__ = ["FORMAT", "PREFIX", "ModelInfo"]

PREFIX = "castling_det."
FORMAT = "1"
_STEP_FIELDS = {"Equalize": set(), "Resize": {"scale", "keep_ratio", "interpolation"}, "Pad": {"size", "pad_values"}}
_EXPORT = "write it with tools/export_onnx.py"


@dataclass(frozen=True)
class ModelInfo:
    """The part of the metadata that running the file needs."""

    classes: tuple[str, ...]
    pad_size_divisor: int
    pad_values: tuple[float, float, float]
    """Of the input's three channels, in its units."""
    pipeline: tuple[dict[str, Any], ...]
    score_thr: float
    nms_iou: float | None

    @classmethod
    def read(cls, metadata: Mapping[str, str], where: str) -> ModelInfo:
        """From the `metadata_props` of a file.

        Raises:
            ValueError: not a file of ours, another format, or one that needs more than this package does with it.
        """
        if f"{PREFIX}format" not in metadata:
            raise ValueError(f"{where}: an ONNX file, but not one of castling_det (no {PREFIX}format in it); {_EXPORT}")
        values = _Values(metadata, where)
        form = values.get("format", str)
        if form != FORMAT:
            raise ValueError(
                f"{where}: format {form!r}, this version of castling_det reads {FORMAT!r}; {_EXPORT} again"
            )
        for key, wanted, option in (
            ("outputs", "detections", "--raw"),
            ("preprocessing", "graph", "--no-preprocessing"),
        ):
            if values.get(key, str) != wanted:
                raise ValueError(
                    f"{where}: {key}={values.get(key, str)!r}: expected {wanted!r}; export without {option}"
                )
        pad_values = values.numbers("pad_values", 3)
        nms_iou = values.get("nms_iou", float, type(None))
        return cls(
            classes=tuple(map(str, values.get("classes", list))),
            pad_size_divisor=values.get("pad_size_divisor", int),
            pad_values=(pad_values[0], pad_values[1], pad_values[2]),
            pipeline=tuple(_checked_step(step, where) for step in values.get("pipeline", list)),
            score_thr=float(values.get("score_thr", float)),
            nms_iou=None if nms_iou is None else float(nms_iou),
        )


class _Values:
    """The metadata's JSON values, checked as they are taken."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self.metadata = metadata
        self.where = where

    def get(self, key: str, *kinds: type) -> Any:
        name = PREFIX + key
        try:
            value = json.loads(self.metadata[name])
        except (KeyError, ValueError):
            raise ValueError(f"{self.where}: {name} is missing or no JSON; {_EXPORT} again") from None
        if float in kinds:
            kinds = (*kinds, int)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{self.where}: {name}={value!r:.80}: expected {wanted}; {_EXPORT} again")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key, list)
        if len(value) != count or not all(isinstance(item, (int, float)) for item in value):
            raise ValueError(f"{self.where}: {PREFIX}{key}={value!r:.80}: expected {count} numbers; {_EXPORT} again")
        return tuple(value)


def _checked_step(step: Any, where: str) -> dict[str, Any]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind not in STEPS:
        known = ", ".join(STEPS)
        raise ValueError(
            f"{where}: {PREFIX}pipeline has the step {kind!r}, this version knows {known}; update castling_det"
        )
    missing = _STEP_FIELDS[kind] - step.keys()
    if missing:
        raise ValueError(f"{where}: {PREFIX}pipeline: {kind} without {', '.join(sorted(missing))}; {_EXPORT} again")
    return dict(step)
