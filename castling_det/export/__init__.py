"""Detectors as ONNX files for other runtimes; each file is checked against MMDetection before it is written."""
