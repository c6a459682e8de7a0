"""Checkpoints in and out: safe reading, ViT initialisation, hybrid to linear-only, softmax to hybrid."""

from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.from_softmax import StartRecord, start_from_softmax
from castling_det.conversion.linearize import convert
from castling_det.conversion.manifest import Manifest
from castling_det.conversion.output import manifest_path
from castling_det.conversion.pretrained import LoadReport, load_pretrained
from castling_det.conversion.weights import WEIGHTS, Weights, select_weights

__all__ = [
    "WEIGHTS",
    "LoadReport",
    "Manifest",
    "StartRecord",
    "Weights",
    "convert",
    "load_checkpoint",
    "load_pretrained",
    "manifest_path",
    "select_weights",
    "start_from_softmax",
]
