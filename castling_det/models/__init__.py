"""What MMDetection's registry builds: backbones, necks and heads."""

from castling_det.compat import check_host

# Before anything of the host is imported, so that a missing or unsupported one is named.
check_host()

from castling_det.models.backbones import CastlingLeViT, CastlingMViT, CastlingViT  # noqa: E402
from castling_det.models.heads import PicoHead, VarifocalSimOTAAssigner  # noqa: E402
from castling_det.models.necks import CSPPAN, SimpleFeaturePyramid  # noqa: E402

__all__ = [
    "CSPPAN",
    "CastlingLeViT",
    "CastlingMViT",
    "CastlingViT",
    "PicoHead",
    "SimpleFeaturePyramid",
    "VarifocalSimOTAAssigner",
]
