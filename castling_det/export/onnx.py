"""From a config and a checkpoint to an ONNX file that has passed its checks."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from castling_det import __version__
from castling_det.compat.host import EXPORTING_TORCH, release
from castling_det.config import load_config
from castling_det.conversion import detectors
from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.export import checks
from castling_det.export.graph import DEFAULT_OPSET, finished, onnx_model, onnx_runner, trace
from castling_det.export.inputs import Shape, example_images, example_shape, image_pipeline
from castling_det.export.network import DeployedDetector
from castling_det.files import atomic_write, sha256_of
from castling_det.runtime.metadata import OUTPUT_NAMES, ModelMetadata
from castling_det.runtime.preprocess import Resize
from castling_det.runtime.torch_detector import class_names

__all__ = ["ExportReport", "export_onnx", "load_deployable"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked."""

    path: Path
    metadata: ModelMetadata
    parity: tuple[checks.ShapeParity, ...]

    def summary(self) -> str:
        """Lines for people."""
        meta, limit = self.metadata, checks.TOLERANCES[self.metadata.precision]
        bounds = limit.line() if limit else "reported only"
        size = self.path.stat().st_size / 1e6
        lines = [
            f"{self.path}: {size:.1f} MB, {meta.precision}, {meta.outputs}, opset {meta.opset}",
            f"attention: {meta.attention}{'; no softmax attention in the graph' * (meta.attention == 'linear')}",
            f"parity with PyTorch at {len(self.parity)} sizes, {bounds}:",
            *(f"  {result.line()}" for result in self.parity),
        ]
        if not any(result.detections for result in self.parity):
            lines.append("  no detection in any: only the head's maps were compared")
        return "\n".join([*lines, *(f"note: {note}" for note in meta.notes)])


def export_onnx(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    raw: bool = False,
    preprocessing: bool = True,
    precision: str = "float32",
    opset: int = DEFAULT_OPSET,
    shapes: Sequence[Shape] | None = None,
) -> ExportReport:
    """Writes `out` after it has passed its checks; on any refusal nothing is written.

    Args:
        config, checkpoint, out: see `load_deployable`; `out` is the `.onnx` file to write.
        raw: the head's own outputs instead of detections.
        preprocessing: take images as they were read; otherwise normalised ones.
        precision: `"float32"`, `"float16"`, or `"int8"`: linear layers quantised dynamically, the rest float32.
        opset: of ONNX's default domain.
        shapes: of the images that the file is compared on; None: `default_shapes`.
    """
    if release(torch.__version__) < release(EXPORTING_TORCH):
        raise ValueError(f"torch {torch.__version__} cannot export detectors; install torch >= {EXPORTING_TORCH}")
    out = Path(out)
    _check_out(out)
    if precision not in checks.TOLERANCES:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, checks.TOLERANCES))}")
    deployed, detector, classes, notes = load_deployable(config, checkpoint)
    (attention,) = detectors.attention_modes(deployed)
    network = DeployedDetector(detector, preprocessing=preprocessing, half=precision == "float16").eval()
    metadata = _described(deployed, network, classes, checkpoint, raw=raw, precision=precision, opset=opset)
    metadata = dataclasses.replace(metadata, attention=attention, notes=(*metadata.notes, *notes))
    program = trace(network)
    if attention == "linear":
        checks.check_linear_only(program)
    model = onnx_model(program, opset=opset)
    # Everything is compared; the file has only the outputs that were asked for, of the same graph.
    every = [output.name for output in model.graph.output]
    asked = [name for name in every if (name not in OUTPUT_NAMES) == raw]
    properties, int8 = metadata.to_properties(), precision == "int8"
    whole, file = (finished(model, names, int8=int8, properties=properties) for names in (every, asked))
    run = onnx_runner(whole.SerializeToString())
    results = checks.check_parity(
        detector, network, run, shapes or checks.default_shapes(network), checks.TOLERANCES[precision]
    )
    try:
        with atomic_write(out) as part:
            part.write_bytes(file.SerializeToString())
            _check_file(part, run, network)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
        message = f"output {out}: cannot be written ({reason}); an older one is as it was"
        raise OSError(error.errno, message) from error
    return ExportReport(out, metadata, results)


def load_deployable(
    config: str | os.PathLike[str] | Config, checkpoint: str | os.PathLike[str]
) -> tuple[Config, nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The deployed config, its detector with the checkpoint's weights, the classes, and notes of what is not proven.

    The checkpoint is one that `tools/convert.py` wrote, or of a linear training; the config may be the castling one.
    A softmax training is taken as it is, as the baseline to compare with.
    """
    config = load_config(config)
    softmax = detectors.attention_modes(config) == {"softmax"}
    attention = "softmax" if softmax else "linear"
    deployed = detectors.with_attention(config if softmax else detectors.training_config(config), attention)
    loaded = load_checkpoint(checkpoint)
    meta, unproven = detectors.check_deployable(loaded, checkpoint, attention)
    detector = detectors.build_detector(deployed)
    _, unknown = detectors.load_weights(detector, loaded, checkpoint)
    return deployed, detector, class_names(meta, deployed), (*unproven, *unknown)


def _check_file(part: Path, compared: checks.Runner, network: DeployedDetector) -> None:
    """Compares the file with the checked graph; with fewer outputs onnxruntime merges other nodes and rounds anew."""
    shape = example_shape(network)
    images = example_images(network, shape).numpy()
    found = onnx_runner(part)(images, None)
    expected = {name: value for name, value in compared(images, None).items() if name in found}
    rounding = checks.TOLERANCES["float16"]
    assert rounding is not None
    if problems := checks.compare(expected, found, shape, rounding).problems(rounding):
        raise ValueError(f"the written file differs from the graph that was compared: {', '.join(problems)}")


def _described(
    config: Config,
    network: DeployedDetector,
    classes: tuple[str, ...],
    checkpoint: str | os.PathLike[str],
    *,
    raw: bool,
    precision: str,
    opset: int,
) -> ModelMetadata:
    pipeline, norm, settings = image_pipeline(config), network.normalization, network.settings
    resize = next((step for step in pipeline[::-1] if isinstance(step, Resize)), None)
    return ModelMetadata(
        version=__version__,
        outputs="raw" if raw else "detections",
        preprocessing="graph" if network.preprocessing else "outside",
        classes=classes,
        **dataclasses.asdict(norm),
        pad_values=norm.pad_values if network.preprocessing else (0.0, 0.0, 0.0),
        input_size=resize.scale if resize else None,
        keep_ratio=bool(resize and resize.keep_ratio),
        pipeline=pipeline,
        score_thr=settings.score_thr,
        nms_iou=settings.nms_iou,
        max_per_img=settings.max_per_img,
        opset=opset,
        precision=precision,
        attention="linear",
        detector=type(network.detector).__name__,
        source_sha256=sha256_of(checkpoint),
        config=Path(config.filename or "").name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        notes=network.notes,
    )


def _check_out(out: Path) -> None:
    """Refuses a name or a place that cannot be written, before the minutes that tracing takes."""
    if out.suffix != ".onnx":
        raise ValueError(f"output {out}: expected a .onnx file")
    if out.is_dir():
        raise ValueError(f"output {out}: is a folder; give the file to write")
    if out.parent.exists() and not os.access(out.parent, os.W_OK):
        raise OSError(errno.EACCES, f"output {out}: its folder cannot be written")
