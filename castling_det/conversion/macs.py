"""What conversion saves, in multiply-adds."""

from __future__ import annotations

from mmengine.config import Config

from castling_det.conversion.detectors import with_attention
from castling_det.conversion.manifest import Macs
from castling_det.report.complexity import detector_complexity

__all__ = ["macs_before_and_after"]


def macs_before_and_after(config: Config, shape: tuple[int, int]) -> Macs:
    """Multiply-adds of one image of `shape` (height, width): the forward of training, and the deployed one.

    Before is the linear forward with the two matrix products of the softmax branch on top.

    Raises:
        ValueError: a part of the detector whose multiply-adds are not known.
    """
    after = detector_complexity(with_attention(config, "linear"), shape).macs
    softmax = detector_complexity(with_attention(config, "softmax"), shape).macs_by_kind
    return Macs(shape, after + softmax["attention"], after)
