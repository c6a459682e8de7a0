"""Weights of a training for a whole detector, as an initialiser that models build by name."""

from __future__ import annotations

from torch import nn

from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.detectors import load_weights
from castling_det.registry import WEIGHT_INITIALIZERS

__all__ = ["TrainedDetector"]


@WEIGHT_INITIALIZERS.register_module()
class TrainedDetector:
    """Fills a detector with the weights of `checkpoint`, averaged ones if there are any; every name must fit.

    Args:
        checkpoint: file of a training of the same detector; it is read without running code in it.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Raises ValueError where the file or its weights do not fit `module`."""
        load_weights(module, load_checkpoint(self.checkpoint), self.checkpoint)
