"""nn.Modules from torch and timm parts; nothing of MMDetection is imported here."""

from castling_det.layers.attention import (
    CastlingAttention,
    HeadInputs,
    MaskedAttention,
    MaskStats,
    attention_layers,
)
from castling_det.layers.block import CastlingBlock
from castling_det.layers.levit import LevitBlock, LevitDownsample, LevitMlp, LevitStage, LevitStem, fuse_norms
from castling_det.layers.levit_attention import LevitAttention
from castling_det.layers.linear_norm import ConvNorm, LinearNorm
from castling_det.layers.local_conv import LocalConv
from castling_det.layers.options import ATTENTION_MODES, LOCAL_CONVS, THRESHOLD_UNITS, AttentionOptions, MaskState
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
    "MaskState",
    "MaskStats",
    "MaskedAttention",
    "PooledAttention",
    "PooledBlock",
    "attention_layers",
    "fuse_norms",
]
