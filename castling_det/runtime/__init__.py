"""Running an exported detector: numpy, OpenCV, msgspec and onnxruntime only, neither torch nor MMDetection."""

from castling_det.runtime.detections import Detections

__all__ = ["Detections"]
