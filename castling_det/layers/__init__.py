"""nn.Modules from torch and timm parts; nothing of MMDetection is imported here."""

from castling_det.layers.attention import CastlingAttention, HeadInputs, MaskedAttention, MaskStats, attention_layers
from castling_det.layers.levit import LevitBlock, LevitDownsample, LevitStage, LevitStem, fuse_norms
from castling_det.layers.levit_attention import LevitAttention
from castling_det.layers.local_conv import LocalConv
from castling_det.layers.mvit import PooledAttention, PooledBlock
from castling_det.layers.options import ATTENTION_MODES, THRESHOLD_UNITS, AttentionOptions, MaskState
from castling_det.layers.vit import CastlingBlock, ConvStem

__all__ = [
    "ATTENTION_MODES",
    "THRESHOLD_UNITS",
    "AttentionOptions",
    "CastlingAttention",
    "CastlingBlock",
    "ConvStem",
    "HeadInputs",
    "LevitAttention",
    "LevitBlock",
    "LevitDownsample",
    "LevitStage",
    "LevitStem",
    "LocalConv",
    "MaskState",
    "MaskStats",
    "MaskedAttention",
    "PooledAttention",
    "PooledBlock",
    "attention_layers",
    "fuse_norms",
]
