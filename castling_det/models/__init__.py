"""What MMDetection's registry builds: backbones and necks."""

from castling_det.models.backbones import CastlingViT
from castling_det.models.necks import SimpleFeaturePyramid

__all__ = ["CastlingViT", "SimpleFeaturePyramid"]
