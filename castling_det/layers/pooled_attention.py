"""MViTv2's pooling attention (arXiv 2112.01526) with softmax, linear-angular or castling attention inside.

Parameter names are those of timm's MultiScaleAttention (Apache-2.0), so that its weights load by key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from castling_det.layers.attention import ATTENTION_MODES, THRESHOLD_UNITS, MaskStats
from castling_det.layers.local_conv import LocalConv
from castling_det.ops import NORMALIZERS, MaskedSoftmax, masked_softmax

__all__ = ["PooledAttention", "pooled_size", "relative_position_logits"]
