"""What an attention layer computes (`AttentionOptions`) and where its vanishing mask stands (`MaskState`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from castling_det.ops import NORMALIZERS

__all__ = ["ATTENTION_MODES", "LOCAL_CONVS", "THRESHOLD_UNITS", "AttentionOptions", "MaskState"]

ATTENTION_MODES = ("softmax", "linear", "castling")
LOCAL_CONVS = ("tokens", "image")
THRESHOLD_UNITS = ("absolute", "uniform")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What an attention layer computes, apart from its sizes. The same parameters serve every mode.

    Raises:
        ValueError: an option outside of its range; names it.
    """

    mode: str = "castling"
    """`"softmax"` (the baseline), `"castling"` (linear, plus a masked softmax branch in training) or `"linear"`."""
    normalizer: str = "l2"
    """`"l2"` (published) or `"kernel"` (rows sum to 1), see `castling_det.ops.linear_angular_attention`."""
    center_keys: bool = False
    """Subtract the mean over the tokens from the keys; softmax does not change, cosines do. Published: False."""
    local_conv: str | None = "image"
    """Depthwise convolution on the values: `"image"` on the feature map, `"tokens"` (published) or None."""
    local_conv_kernel_size: int = 3
    """Odd side of the kernel of `local_conv="image"`."""
    threshold: float = 0.02
    """The mask keeps softmax probabilities above it; published 0.02. The start value where a hook moves it."""
    threshold_unit: str = "absolute"
    """`"absolute"` (published): a probability. `"uniform"`: multiples of 1/N, the probability of a uniform row."""
    eval_aux: bool = False
    """Keep the softmax branch in eval mode, to measure the difference to the deployed network."""

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, ATTENTION_MODES)
        _check_choice("normalizer", self.normalizer, NORMALIZERS)
        if self.local_conv is not None:
            _check_choice("local_conv", self.local_conv, LOCAL_CONVS, more=" or None")
        kernel_size = self.local_conv_kernel_size
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"local_conv_kernel_size={kernel_size}: expected an odd positive number, such as 3 or 5")
        MaskState(self.threshold, self.threshold_unit)
        if self.eval_aux and self.mode != "castling":
            raise ValueError(f"eval_aux=True: only mode='castling' has the softmax branch, got mode={self.mode!r}")


@dataclass(frozen=True)
class MaskState:
    """The mask of one layer's softmax branch. `dataclasses.asdict` writes it into a checkpoint's meta.

    Raises:
        ValueError: a value outside of its range; names it.
    """

    threshold: float
    """Probabilities above it are kept; >= 0, and inf empties the mask for any input."""
    threshold_unit: str = "absolute"
    """`"absolute"`: a probability. `"uniform"`: multiples of 1/N, for rows over N keys."""
    aux_scale: float = 1.0
    """Factor on the output of the branch, finite and >= 0."""
    ramp: float = 0.0
    """How far each layer is on its way from `threshold` to a probability of 1, in the logarithm of the probability,
    in [0, 1]."""

    def __post_init__(self) -> None:
        _check_choice("threshold_unit", self.threshold_unit, THRESHOLD_UNITS)
        if not isinstance(self.threshold, (int, float)) or not self.threshold >= 0:
            raise ValueError(
                f"threshold={self.threshold!r}: expected a number >= 0 in the unit {self.threshold_unit!r}"
            )
        if not isinstance(self.aux_scale, (int, float)) or not 0 <= self.aux_scale < math.inf:
            raise ValueError(f"aux_scale={self.aux_scale!r}: expected a finite factor >= 0")
        if not isinstance(self.ramp, (int, float)) or not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp={self.ramp!r}: expected a number in [0, 1]")

    @classmethod
    def from_meta(cls, record: Mapping[str, Any]) -> MaskState:
        """Reads a record of a checkpoint's meta, which may hold more than the fields; older ones have no `ramp`.

        Raises:
            ValueError: a field that is absent or out of range.
        """
        record = {"ramp": 0.0, **record}
        return cls(**{field.name: record.get(field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]

    def absolute(self, num_tokens: int) -> float:
        """The threshold as a probability, for rows over `num_tokens` keys."""
        threshold = self.threshold / num_tokens if self.threshold_unit == "uniform" else self.threshold
        return threshold if self.ramp == 0 else threshold ** (1 - self.ramp)

    def __str__(self) -> str:
        ramp = f", {self.ramp:.0%} of the way to 1" if self.ramp else ""
        return f"{self.threshold:.4g} ({self.threshold_unit}{ramp})"

    def is_empty(self, num_tokens: int) -> bool:
        """Whether the branch adds nothing for any input of `num_tokens` keys: no probability exceeds 1."""
        return self.absolute(num_tokens) >= 1 or self.aux_scale == 0


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, more: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}{more}")
