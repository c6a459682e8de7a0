"""nn.Modules from torch and timm parts; nothing of MMDetection is imported here."""

from castling_det.layers.attention import (
    ATTENTION_MODES,
    THRESHOLD_UNITS,
    CastlingAttention,
    HeadInputs,
    MaskedAttention,
    MaskStats,
)
from castling_det.layers.block import CastlingBlock
from castling_det.layers.levit import LevitBlock, LevitDownsample, LevitMlp, LevitStage, LevitStem, fuse_norms
from castling_det.layers.levit_attention import LevitAttention
from castling_det.layers.linear_norm import ConvNorm, LinearNorm
from castling_det.layers.local_conv import LOCAL_CONVS, LocalConv
from castling_det.layers.options import AttentionOptions
from castling_det.layers.pooled_attention import PooledAttention
from castling_det.layers.pooled_block import PooledBlock
from castling_det.layers.stem import ConvStem

__all__ = [
    "ATTENTION_MODES",
    "LOCAL_CONVS",
    "THRESHOLD_UNITS",
    "AttentionOptions",
    "CastlingAttention",
    "CastlingBlock",
    "ConvNorm",
    "ConvStem",
    "HeadInputs",
    "LevitAttention",
    "LevitBlock",
    "LevitDownsample",
    "LevitMlp",
    "LevitStage",
    "LevitStem",
    "LinearNorm",
    "LocalConv",
    "MaskStats",
    "MaskedAttention",
    "PooledAttention",
    "PooledBlock",
    "fuse_norms",
]
