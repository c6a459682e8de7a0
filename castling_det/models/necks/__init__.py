"""Necks, registered in `castling_det.registry.MODELS`."""

from castling_det.models.necks.csp_pan import CSPPAN
from castling_det.models.necks.simple_feature_pyramid import SimpleFeaturePyramid

__all__ = ["CSPPAN", "SimpleFeaturePyramid"]
