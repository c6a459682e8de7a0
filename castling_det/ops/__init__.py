"""Pure functions on tensors, torch only.

Shape suffixes, here and in attention bodies: B batch, H heads, G = B * H, N tokens,
M a block of query tokens, K channels of a head, C = H * K.
"""

from castling_det.ops.linear_angular import NORMALIZERS, linear_angular_attention
from castling_det.ops.masked_softmax import MaskedSoftmax, masked_softmax, masked_softmax_attention
from castling_det.ops.numerics import EPS, inverse_norm

__all__ = [
    "EPS",
    "NORMALIZERS",
    "MaskedSoftmax",
    "inverse_norm",
    "linear_angular_attention",
    "masked_softmax",
    "masked_softmax_attention",
]
