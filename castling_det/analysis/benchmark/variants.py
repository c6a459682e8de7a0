"""The formulations that are compared, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from castling_det.analysis.benchmark.attentions import DenseAttention, PublishedAttention
from castling_det.analysis.benchmark.record import LEVELS, PASSES
from castling_det.layers import CastlingAttention

__all__ = ["BASELINE", "COMPILED", "FLOOR", "LINEAR", "VARIANTS", "Variant"]

BASELINE = "softmax"
LINEAR = "linear"
FLOOR = "floor"
COMPILED = "linear_compiled"

DENSE_TOKENS = 4096
"""Longest sequence of `dense`: its N x N tensors take 400 MiB each there with six heads in float32."""


@dataclass(frozen=True)
class Variant:
    """What stands in the place of each attention layer, and where it is measured.

    Attributes:
        options: those of `CastlingAttention` that differ from the layer in whose place it stands.
        attention: its class.
        hybrid: the layer is in training mode also in a forward without gradients, so that its softmax branch runs.
        masked: the mask of that branch is active: entries lie at its threshold.
        compiled: called through `torch.compile`.
        levels: where it is defined. passes: likewise.
        max_tokens: longest sequence; rows of longer ones are skipped and say so.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    attention: type[CastlingAttention] = CastlingAttention
    hybrid: bool = False
    masked: bool = False
    compiled: bool = False
    levels: tuple[str, ...] = LEVELS
    passes: tuple[str, ...] = PASSES
    max_tokens: int | None = None

    @property
    def quadratic(self) -> bool:
        """Whether its reference needs the N x N matrix."""
        return self.masked or self.options["mode"] == "softmax"


_LINEAR = {"mode": "linear", "local_conv": "image"}
_HYBRID = {"mode": "castling", "local_conv": "image", "threshold": 1.0, "threshold_unit": "uniform"}
_EMPTY = {**_HYBRID, "threshold_unit": "absolute"}
_PUBLISHED = {"mode": "linear", "local_conv": "tokens", "normalizer": "l2"}

VARIANTS: Mapping[str, Variant] = {
    # Without the local convolution that this package gives its softmax mode: nothing slows the baseline.
    BASELINE: Variant({"mode": "softmax", "local_conv": None}),
    LINEAR: Variant(_LINEAR),
    "castling": Variant(_HYBRID, hybrid=True, masked=True),
    "castling_empty": Variant(_EMPTY, hybrid=True),
    "published": Variant(_PUBLISHED, PublishedAttention),
    "dense": Variant(_HYBRID, DenseAttention, hybrid=True, masked=True, max_tokens=DENSE_TOKENS),
    FLOOR: Variant(_LINEAR, levels=("core",), passes=("forward",)),
    COMPILED: Variant(_LINEAR, compiled=True),
}
