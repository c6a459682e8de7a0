"""Pure functions on tensors, torch only.

Shape suffixes, here and in attention bodies: B batch; H heads; G a group of heads; N tokens; M queries, when fewer
than the N keys; K channels of a head; V channels of its values, when not K; C = H * K.
"""

from castling_det.ops.linear_angular import NORMALIZERS, linear_angular_attention, linear_angular_packed
from castling_det.ops.masked_softmax import (
    MaskedSoftmax,
    masked_softmax,
    masked_softmax_attention,
    masked_softmax_packed,
)
from castling_det.ops.numerics import EPS

__all__ = [
    "EPS",
    "NORMALIZERS",
    "MaskedSoftmax",
    "linear_angular_attention",
    "linear_angular_packed",
    "masked_softmax",
    "masked_softmax_attention",
    "masked_softmax_packed",
]
