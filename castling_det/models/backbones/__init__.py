"""Backbones, registered in `castling_det.registry.MODELS`."""

from castling_det.models.backbones.castling_vit import CastlingViT

__all__ = ["CastlingViT"]
