"""The options of the attention, in one object that layers, backbones, checkpoints and exported files share."""

from __future__ import annotations

from dataclasses import dataclass

from castling_det.ops import NORMALIZERS

__all__ = ["ATTENTION_MODES", "LOCAL_CONVS", "THRESHOLD_UNITS", "AttentionOptions"]

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
        _check_choice("threshold_unit", self.threshold_unit, THRESHOLD_UNITS)
        if self.local_conv is not None:
            _check_choice("local_conv", self.local_conv, LOCAL_CONVS)
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold}: expected a number >= 0 in the unit {self.threshold_unit!r}")
        if self.eval_aux and self.mode != "castling":
            raise ValueError(f"eval_aux=True: only mode='castling' has the softmax branch, got mode={self.mode!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}")
