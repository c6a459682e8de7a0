"""Pure functions on tensors, torch only.

Shape suffixes, here and in attention bodies: B batch, H heads, G a group of heads, N tokens,
M a block of query tokens, K channels of a head, C = H * K.
"""

from castling_det.ops.linear_angular import NORMALIZERS, linear_angular_attention, linear_angular_packed
from castling_det.ops.masked_softmax import MaskedSoftmax, masked_softmax, masked_softmax_attention
from castling_det.ops.numerics import EPS

__all__ = [
    "EPS",
    "NORMALIZERS",
    "MaskedSoftmax",
    "linear_angular_attention",
    "linear_angular_packed",
    "masked_softmax",
    "masked_softmax_attention",
]
