"""Detectors trained with Castling-ViT's hybrid attention and deployed with linear attention only.

A plugin for MMDetection 3.x. Importing it registers the package with mmengine's config look-up and lets
torchvision stand in where mmcv has no compiled operators; torch, mmengine and mmdet load only when used.
"""

from castling_det import startup as _startup

TYPE_CHECKING = False  # importing typing would cost 8 ms
if TYPE_CHECKING:
    from castling_det.datasets.config_checks import check_dataset
    from castling_det.runtime.detector import Detector

__all__ = ["Detector", "__version__", "check_dataset"]

__version__ = "0.1.0"

_startup.install()


_LAZY = {"Detector": "castling_det.runtime.detector", "check_dataset": "castling_det.datasets.config_checks"}


def __getattr__(name: str) -> object:
    """What needs more than the standard library is imported when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
