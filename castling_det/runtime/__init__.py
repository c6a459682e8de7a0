"""Running an exported detector: numpy, OpenCV and onnxruntime only, neither torch nor MMDetection.

- `onnx_detector`: an ONNX file of `tools/export_onnx.py` as a detector of images.
- `preprocess`: the test pipeline's pixels, as MMDetection computes them.
- `sources`, `video`: images, folders, globs, videos and cameras, one by one.
- `predictions`, `draw`: COCO files and pictures.
- `tiled`: images larger than the network's input, through SAHI.
"""

from castling_det.runtime.detections import Detections

__all__ = ["Detections"]
