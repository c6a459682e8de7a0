"""Where an attention layer looks: its exact weights for chosen tokens, and pictures of them over the image."""

from castling_det.report.attention_maps.capture import Capture, capture, load_detector, query_at
from castling_det.report.attention_maps.picture import AttentionPicture, attention_picture, read_picture
from castling_det.report.attention_maps.weights import BranchWeights, branch_weights, layer_weights

__all__ = [
    "AttentionPicture",
    "BranchWeights",
    "Capture",
    "attention_picture",
    "branch_weights",
    "capture",
    "layer_weights",
    "load_detector",
    "query_at",
    "read_picture",
]
