"""What MMDetection's registry builds: backbones and necks."""

from castling_det.compat import check_host

# Before anything of the host is imported, so that a missing or unsupported one is named.
check_host()

from castling_det.models.backbones import CastlingViT  # noqa: E402
from castling_det.models.necks import SimpleFeaturePyramid  # noqa: E402

__all__ = ["CastlingViT", "SimpleFeaturePyramid"]
