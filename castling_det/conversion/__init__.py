"""Checkpoints in and out: safe reading, pretrained weights, hybrid to linear-only, softmax to hybrid."""

from castling_det.conversion.checkpoints import WEIGHTS, Weights, load_checkpoint, select_weights
from castling_det.conversion.convert import convert, manifest_path
from castling_det.conversion.from_softmax import start_from_softmax
from castling_det.conversion.manifest import Manifest
from castling_det.conversion.pretrained import LoadReport, load_pretrained

__all__ = [
    "WEIGHTS",
    "LoadReport",
    "Manifest",
    "Weights",
    "convert",
    "load_checkpoint",
    "load_pretrained",
    "manifest_path",
    "select_weights",
    "start_from_softmax",
]
