"""Backbones, registered in `castling_det.registry.MODELS`."""

from castling_det.models.backbones.castling_levit import CastlingLeViT
from castling_det.models.backbones.castling_mvit import CastlingMViT
from castling_det.models.backbones.castling_vit import CastlingViT

__all__ = ["CastlingLeViT", "CastlingMViT", "CastlingViT"]
