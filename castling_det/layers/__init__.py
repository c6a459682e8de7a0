"""nn.Modules from torch and timm parts; nothing of MMDetection is imported here."""

from castling_det.layers.attention import ATTENTION_MODES, THRESHOLD_UNITS, CastlingAttention, MaskStats
from castling_det.layers.block import CastlingBlock
from castling_det.layers.local_conv import LOCAL_CONVS, LocalConv
from castling_det.layers.stem import ConvStem

__all__ = [
    "ATTENTION_MODES",
    "LOCAL_CONVS",
    "THRESHOLD_UNITS",
    "CastlingAttention",
    "CastlingBlock",
    "ConvStem",
    "LocalConv",
    "MaskStats",
]
