"""A detector that onnxruntime runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.runtime.detections import Detections, Image, in_groups
from castling_det.runtime.metadata import INPUT_NAME, OUTPUT_NAMES, SIZES_NAME, ModelMetadata
from castling_det.runtime.preprocess import Prepared, padded_to_multiple, prepare

__all__ = ["OnnxDetector"]


class OnnxDetector:
    """An ONNX file of `tools/export_onnx.py`; `info` has the file's metadata, `device` is as for `Detector`."""

    def __init__(self, path: str | os.PathLike[str], *, device: str = "cpu") -> None:
        self.path = Path(path)
        self._session = _session(self.path, device)
        self.info = ModelMetadata.from_properties(self._session.get_modelmeta().custom_metadata_map, f"model {path}")
        needed = (("outputs", "detections", "--raw"), ("preprocessing", "graph", "--no-preprocessing"))
        for field, wanted, option in needed:
            if (value := getattr(self.info, field)) != wanted:
                raise ValueError(f"model {path}: {field}={value!r}: expected {wanted!r}; export without {option}")
        self.classes = self.info.classes
        _check_interface(self._session, path)
        # Files of earlier versions have no such input: they see padding as image.
        self._takes_sizes = any(value.name == SIZES_NAME for value in self._session.get_overridable_initializers())

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image; images that have one size after the pipeline share a batch."""
        prepared = [prepare(image, self.info.pipeline) for image in images]
        sizes = [padded_to_multiple(one.pixels.shape, self.info.pad_size_divisor) for one in prepared]
        return in_groups(sizes, lambda indices: self._batch([prepared[i] for i in indices], sizes[indices[0]]))

    def _batch(self, prepared: list[Prepared], hw: tuple[int, int]) -> list[Detections]:
        # The padding has the values that the graph turns into zeros.
        values = np.array(self.info.pad_values, dtype=np.float32).reshape(1, 3, 1, 1)
        batch = np.broadcast_to(values, (len(prepared), 3, *hw)).copy()
        for row, one in enumerate(prepared):
            height, width = one.pixels.shape[:2]
            batch[row, :, :height, :width] = one.pixels.transpose(2, 0, 1)
        given = {INPUT_NAME: batch}
        if self._takes_sizes:
            given[SIZES_NAME] = np.array([one.pixels.shape[:2] for one in prepared], dtype=np.float32)
        try:
            outputs = self._session.run(list(OUTPUT_NAMES), given)
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            raise self._wrong(f"onnxruntime failed on images of shape {batch.shape}: {_line(error)}") from error
        rows, shapes = outputs[1].shape[-1], [value.shape for value in outputs]
        if shapes != [(len(batch), rows, 4), (len(batch), rows), (len(batch), rows)]:
            raise self._wrong(f"gives {', '.join(OUTPUT_NAMES)} of shapes {shapes} for {len(batch)} images")
        return [self._detections(*row) for row in zip(prepared, *outputs, strict=True)]

    def _detections(
        self, prepared: Prepared, boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> Detections:
        kept = labels >= 0
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise self._wrong("gives boxes or scores that are not finite")
        if len(labels) and labels.max() >= len(self.classes):
            raise self._wrong(f"gives label {labels.max()}, but names {len(self.classes)} classes")
        return Detections(prepared.to_original(boxes), scores, labels, self.classes)

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"model {self.path}: {what}; export it again")


def _session(path: Path, device: str) -> Any:
    if not path.is_file():
        raise ValueError(f"model {path}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"model {path}: needs onnxruntime; pip install 'castling-det[runtime]'") from None
    # Older versions read weights from any path; this is the first that refuses a path outside of the file's folder.
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 18):
        problem = f"onnxruntime {onnxruntime.__version__} reads any file that an ONNX file names"
        raise ValueError(f"model {path}: {problem}; pip install 'onnxruntime>=1.18'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they come as exceptions, warnings are about the machine
    providers = _providers(device, onnxruntime)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        problem = f"not an ONNX file that onnxruntime reads ({_line(error)}); copy or export it again"
        raise ValueError(f"model {path}: {problem}") from error
    if device != "cpu" and "CUDAExecutionProvider" not in session.get_providers():
        raise ValueError(f"device={device!r}: onnxruntime cannot start CUDA there; check driver, CUDA and cuDNN")
    return session


def _providers(device: str, onnxruntime: Any) -> list[Any]:
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda' or 'cuda:N'")
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise ValueError(f"device={device!r}: this onnxruntime has {', '.join(available)}; pip install onnxruntime-gpu")
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"]


def _check_interface(session: Any, path: str | os.PathLike[str]) -> None:
    inputs = {value.name: (value.type, len(value.shape), value.shape[1:2]) for value in session.get_inputs()}
    outputs = {value.name: (value.type, len(value.shape)) for value in session.get_outputs()}
    expected = dict(zip(OUTPUT_NAMES, (("tensor(float)", 3), ("tensor(float)", 2), ("tensor(int64)", 2)), strict=True))
    if inputs != {INPUT_NAME: ("tensor(float)", 4, [3])} or {name: outputs.get(name) for name in expected} != expected:
        raise ValueError(
            f"model {path}: inputs {inputs}, outputs {outputs}: expected float images (batch, 3, height, width), and "
            "float boxes (batch, rows, 4), float scores and int64 labels (batch, rows); export it again"
        )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
