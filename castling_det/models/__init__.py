"""What MMDetection's registry builds: backbones, necks, heads, and a detector with a teacher."""

from castling_det.compat import check_host

# Before anything of the host is imported, so that a missing or unsupported one is named.
check_host()

from castling_det.models.backbones import CastlingLeViT, CastlingMViT, CastlingViT  # noqa: E402
from castling_det.models.detectors import DistilledSingleStage  # noqa: E402
from castling_det.models.fused import FusedDetector, fuse_detector  # noqa: E402
from castling_det.models.heads import PicoHead, VarifocalSimOTAAssigner  # noqa: E402
from castling_det.models.necks import CSPPAN, SimpleFeaturePyramid  # noqa: E402

__all__ = [
    "CSPPAN",
    "CastlingLeViT",
    "CastlingMViT",
    "CastlingViT",
    "DistilledSingleStage",
    "FusedDetector",
    "PicoHead",
    "SimpleFeaturePyramid",
    "VarifocalSimOTAAssigner",
    "fuse_detector",
]
