"""Detectors trained with Castling-ViT's hybrid attention and deployed with linear attention only.

A plugin for MMDetection 3.x. Importing it registers the package with mmengine's config look-up and lets
torchvision stand in where mmcv has no compiled operators; torch, mmengine and mmdet load only when used.
"""

from castling_det import startup as _startup

__all__ = ["__version__"]

__version__ = "0.1.0"

_startup.install()
