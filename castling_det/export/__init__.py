"""Detectors as files for other runtimes: ONNX, torch.export, AOTInductor; each is checked against MMDetection."""
