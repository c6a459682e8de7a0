"""What MMDetection's registry builds: backbones, necks, heads, and a detector with a teacher."""

from castling_det.compat.host import check_host

# First, because the imports below need MMDetection: a missing or unsupported one gets an error that says what to do.
check_host()

from castling_det.models.csp_pan import CSPPAN  # noqa: E402
from castling_det.models.distilled import DistilledSingleStage  # noqa: E402
from castling_det.models.fuse import fuse_detector  # noqa: E402
from castling_det.models.levit import CastlingLeViT  # noqa: E402
from castling_det.models.mvit import CastlingMViT  # noqa: E402
from castling_det.models.pico_head import PicoHead  # noqa: E402
from castling_det.models.sim_ota import VarifocalSimOTAAssigner  # noqa: E402
from castling_det.models.simple_feature_pyramid import SimpleFeaturePyramid  # noqa: E402
from castling_det.models.vit import CastlingViT  # noqa: E402

__all__ = [
    "CSPPAN",
    "CastlingLeViT",
    "CastlingMViT",
    "CastlingViT",
    "DistilledSingleStage",
    "PicoHead",
    "SimpleFeaturePyramid",
    "VarifocalSimOTAAssigner",
    "fuse_detector",
]
