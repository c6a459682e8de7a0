"""A detector that onnxruntime runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from castling_det.runtime.detections import Detections, Image
from castling_det.runtime.model_info import ModelInfo
from castling_det.runtime.preprocess import Prepared, padded_to_multiple, prepare, size_of

__all__ = ["OnnxDetector"]

OUTPUTS = ("boxes", "scores", "labels")


class OnnxDetector:
    """An ONNX file of `tools/export_onnx.py`.

    Args:
        path: the file.
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.

    Attributes:
        info: what the file says of itself.
        classes: names by label.

    Raises:
        ValueError: no such file, not one of ours, or a device that onnxruntime does not have.
    """

    def __init__(self, path: str | os.PathLike[str], *, device: str = "cpu") -> None:
        self.path = Path(path)
        self.session = _session(self.path, device)
        self.info = ModelInfo.read(self.session.get_modelmeta().custom_metadata_map, f"model {path}")
        self.classes = self.info.classes
        _check_interface(self.session, path)

    def detect(self, images: list[Image]) -> list[Detections]:
        """One result for each image. Those that have one size behind the pipeline share a batch, so that the
        result of an image does not depend on the others."""
        prepared = [prepare(image, self.info.pipeline) for image in images]
        groups: dict[tuple[int, int], list[int]] = {}
        for index, one in enumerate(prepared):
            hw = padded_to_multiple(size_of(one.pixels), self.info.pad_size_divisor)
            groups.setdefault(hw, []).append(index)
        found: dict[int, Detections] = {}
        for hw, indices in groups.items():
            batch = self._batch([prepared[index] for index in indices], hw)
            boxes, scores, labels = self._run(batch)
            for row, index in enumerate(indices):
                found[index] = self._detections(prepared[index], boxes[row], scores[row], labels[row])
        return [found[index] for index in range(len(images))]

    def _batch(self, prepared: list[Prepared], hw: tuple[int, int]) -> NDArray[np.float32]:
        """(batch, 3, height, width) with the values that the graph turns into zeros where there is no image."""
        values = np.array(self.info.pad_values, dtype=np.float32).reshape(1, 3, 1, 1)
        batch = np.broadcast_to(values, (len(prepared), 3, *hw)).copy()
        for row, one in enumerate(prepared):
            height, width = one.pixels.shape[:2]
            batch[row, :, :height, :width] = one.pixels.transpose(2, 0, 1)
        return batch

    def _run(self, batch: NDArray[np.float32]) -> list[Any]:
        try:
            return list(self.session.run(list(OUTPUTS), {"images": batch}))
        except Exception as error:  # onnxruntime has a class of its own for each kind of failure
            raise ValueError(
                f"model {self.path}: onnxruntime failed on images of shape {batch.shape}: {str(error)[:300]}"
            ) from error

    def _detections(
        self, prepared: Prepared, boxes: NDArray[np.float32], scores: NDArray[np.float32], labels: NDArray[np.int64]
    ) -> Detections:
        kept = labels >= 0
        return Detections(prepared.to_original(boxes[kept]), scores[kept], labels[kept], self.classes)


def _session(path: Path, device: str) -> Any:
    if not path.is_file():
        raise ValueError(f"model {path}: no such file")
    try:
        import onnxruntime
    except ImportError:
        raise ValueError(f"model {path}: needs onnxruntime; pip install 'castling-det[runtime]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: they come as exceptions, warnings are about the machine
    providers = _providers(device, onnxruntime)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a class of its own for each kind of damage
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"model {path}: not an ONNX file that onnxruntime reads ({reason}); copy or export it again"
        ) from error
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
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    if set(inputs) != {"images"} or not set(OUTPUTS) <= outputs:
        raise ValueError(
            f"model {path}: inputs {', '.join(inputs)}, outputs {', '.join(sorted(outputs))}: expected images and "
            f"{', '.join(OUTPUTS)}; write it with tools/export_onnx.py again"
        )
    shape = inputs["images"].shape
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"model {path}: images of shape {shape}: expected three channels, (batch, 3, height, width)")
