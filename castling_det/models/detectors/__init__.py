"""Detectors for training; what is deployed is MMDetection's own."""

from castling_det.models.detectors.distilled import DistilledSingleStage

__all__ = ["DistilledSingleStage"]
