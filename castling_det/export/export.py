"""From a config and a checkpoint to a checked file."""

from __future__ import annotations

import datetime
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from torch import nn

from castling_det import __version__
from castling_det.conversion.checkpoints import load_checkpoint
from castling_det.conversion.detectors import (
    build_detector,
    check_deployable,
    load_weights,
    training_config,
    with_attention,
)
from castling_det.export.attention_check import SoftmaxUse, check_linear_only
from castling_det.export.inputs import image_pipeline
from castling_det.export.metadata import FileMetadata
from castling_det.export.network import DeployedDetector
from castling_det.export.onnx_file import DEFAULT_OPSET, linear_layers, onnx_model, onnx_runner, with_outputs
from castling_det.export.parity import TOLERANCES, Runner, ShapeParity, Tolerance, check_parity, default_shapes
from castling_det.export.program import check_torch, example_images, export_program
from castling_det.export.quantise import quantised
from castling_det.files import atomic_write, sha256_of

__all__ = [
    "PRECISIONS",
    "ExportReport",
    "Source",
    "check_out",
    "describe",
    "example_shape",
    "export_onnx",
    "load_source",
    "write_checked",
]

PRECISIONS = tuple(TOLERANCES)
RAW_PREFIX = "raw_"


@dataclass(frozen=True)
class Source:
    """A detector that can be deployed, and where it came from."""

    config: Config
    detector: nn.Module
    sha256: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    """What could not be checked."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was checked."""

    path: Path
    bytes: int
    metadata: FileMetadata
    parity: tuple[ShapeParity, ...]
    tolerance: Tolerance | None
    softmax: tuple[SoftmaxUse, ...]
    """All that is left in the graph; none of it is attention, except in a head that was allowed its own."""

    def summary(self) -> str:
        """Lines for people."""
        meta, limit = self.metadata, self.tolerance
        where = f", opset {meta.opset}" if meta.opset else ""
        bounds = (
            "reported only"
            if limit is None
            else f"within maps {limit.raw:g}, boxes {limit.box:g} px, scores {limit.score:g}, "
            f"{limit.unmatched:.0%} unmatched"
        )
        lines = [
            f"{self.path}: {self.bytes / 1e6:.1f} MB, {meta.precision}, {meta.outputs}{where}",
            f"attention: {meta.attention}; softmax in the graph: {_described(self.softmax)}",
            f"parity with PyTorch at {len(self.parity)} sizes, {bounds}:",
            *(f"  {result.line()}" for result in self.parity),
        ]
        if not any(result.detections for result in self.parity):
            lines.append("  no detection in any: only the head's maps were compared")
        return "\n".join([*lines, *(f"note: {note}" for note in meta.notes)])


def load_source(config: str | os.PathLike[str] | Config, checkpoint: str | os.PathLike[str]) -> Source:
    """The linear detector of a config with a checkpoint's weights.

    Args:
        config: a deploy or linear config; the castling config that it was converted from will do.
        checkpoint: one that `tools/convert.py` wrote, or of a training with attention='linear'.

    Raises:
        ValueError: unusable config or checkpoint, or one whose softmax branch is not known to be gone.
    """
    linear = with_attention(training_config(config), "linear")
    loaded = load_checkpoint(checkpoint)
    meta, unproven = check_deployable(loaded, checkpoint)
    detector = build_detector(linear)
    _, unknown = load_weights(detector, loaded, checkpoint)
    classes = (meta.get("dataset_meta") or {}).get("classes") or _classes(linear)
    return Source(linear, detector, sha256_of(checkpoint), tuple(map(str, classes)), (*unproven, *unknown))


def example_shape(network: DeployedDetector) -> tuple[int, int, int]:
    """Batch, height and width to trace with; parity is checked at others."""
    unit = network.normalization.pad_size_divisor
    return 2, (network.min_units + 1) * unit, (network.min_units + 3) * unit


def export_onnx(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    raw: bool = False,
    preprocessing: bool = True,
    precision: str = "float32",
    opset: int = DEFAULT_OPSET,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    allow_head_softmax: bool = False,
) -> ExportReport:
    """Writes `out` after it has passed its checks; on any refusal nothing is written.

    Args:
        config, checkpoint: see `load_source`.
        out: file to write, `.onnx`.
        raw: the head's own outputs instead of detections.
        preprocessing: take images as they were read; otherwise normalised ones.
        precision: `"float32"`, `"float16"`, or `"int8"`: linear layers quantised dynamically, the rest float32.
        opset: of ONNX's default domain.
        shapes: batch, height and width of the images that the file is compared on; None: `default_shapes`.
        allow_head_softmax: accept a transformer head's own attention over its queries (DINO).

    Raises:
        ValueError: unusable files or options, softmax attention in the graph, or a difference from PyTorch.
        OSError: `out` cannot be written. An older `out` is as it was.
    """
    check_torch()
    out = Path(out)
    check_out(out, ".onnx")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: expected one of {', '.join(map(repr, PRECISIONS))}")
    source = load_source(config, checkpoint)
    network = DeployedDetector(source.detector, preprocessing=preprocessing, half=precision == "float16").eval()
    program = export_program(network, example_shape(network))
    softmax = check_linear_only(program, allow_in=network.head_attention if allow_head_softmax else ())
    traced = onnx_model(program, opset=opset)
    layers = linear_layers(traced)
    # Everything is compared; the file has only what was asked for, of the same graph.
    whole = with_outputs(traced, lambda _: True, {})
    metadata = describe(source, network, raw=raw, precision=precision, opset=opset)
    asked = with_outputs(traced, lambda name: name.startswith(RAW_PREFIX) == raw, {})
    if precision == "int8":
        whole, asked = quantised(whole, layers), quantised(asked, layers)
    asked = with_outputs(asked, lambda _: True, metadata.to_properties())
    content = asked.SerializeToString()
    run = onnx_runner(whole.SerializeToString())
    results = check_parity(source.detector, network, run, shapes or default_shapes(network), TOLERANCES[precision])
    write_checked(out, lambda part: part.write_bytes(content), lambda part: _check_file(part, run, network))
    return ExportReport(out, len(content), metadata, results, TOLERANCES[precision], softmax)


def write_checked(out: Path, write: Callable[[Path], object], check: Callable[[Path], None]) -> None:
    """Writes a temporary file, checks it, and gives it its name; a file that fails is removed.

    Raises:
        ValueError: `check` has found a fault.
        OSError: it cannot be written, such as on a full disk.
    """
    try:
        with atomic_write(out) as part:
            write(part)
            check(part)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
        message = f"output {out}: cannot be written ({reason}); an older one is as it was"
        raise OSError(error.errno, message) from error


def _check_file(part: Path, compared: Runner, network: DeployedDetector) -> None:
    """The file itself, from the disk, gives what the compared graph gives."""
    images = example_images(network, example_shape(network)).numpy()
    expected = compared(images)
    for name, value in onnx_runner(part)(images).items():
        if not np.allclose(value, expected[name], rtol=1e-4, atol=1e-4):
            raise ValueError(f"output {name} of the written file differs from the graph that was compared")


def describe(
    source: Source, network: DeployedDetector, *, raw: bool, precision: str, opset: int | None
) -> FileMetadata:
    """The file's metadata."""
    images = image_pipeline(source.config)
    norm = network.normalization
    return FileMetadata(
        version=__version__,
        outputs="raw" if raw else "detections",
        preprocessing="graph" if network.preprocessing else "outside",
        classes=source.classes,
        mean=norm.mean,
        std=norm.std,
        bgr_to_rgb=norm.bgr_to_rgb,
        pad_size_divisor=norm.pad_size_divisor,
        pad_values=norm.pad_values if network.preprocessing else (0.0, 0.0, 0.0),
        input_size=images.input_size,
        keep_ratio=images.keep_ratio,
        pipeline=images.transforms,
        score_thr=network.score_thr,
        nms_iou=network.nms_iou,
        max_per_img=network.max_per_img,
        opset=opset,
        precision=precision,
        attention="linear",
        detector=type(source.detector).__name__,
        source_sha256=source.sha256,
        config=Path(source.config.filename or "").name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        notes=(*network.notes, *source.notes),
    )


def _classes(config: Config) -> tuple[str, ...]:
    """Of the test data's metainfo, else numbered."""
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    named = dataset.get("metainfo", {}).get("classes")
    if named:
        return tuple(named)
    from mmdet.datasets import CocoDataset

    model = config.model
    head = model.get("bbox_head") or model.get("roi_head", {}).get("bbox_head", {})
    count = int(head.get("num_classes", 80))
    coco = tuple(CocoDataset.METAINFO["classes"])
    return coco if dataset.get("type") == "CocoDataset" and len(coco) == count else tuple(map(str, range(count)))


def check_out(out: Path, suffix: str) -> None:
    """Refuses a name or a place that cannot be written, before the minutes that tracing takes.

    Raises:
        ValueError: another suffix, or a folder. OSError: no permission.
    """
    if out.suffix != suffix:
        raise ValueError(f"output {out}: expected a {suffix} file")
    if out.is_dir():
        raise ValueError(f"output {out}: is a folder; give the file to write")
    if out.parent.exists() and not os.access(out.parent, os.W_OK):
        raise OSError(errno.EACCES, f"output {out}: its folder cannot be written")


def _described(uses: tuple[SoftmaxUse, ...]) -> str:
    if not uses:
        return "none"
    kinds = sorted({f"{use.owner}{' (attention, allowed)' if use.is_attention else ''}" for use in uses})
    return f"{len(uses)} in {', '.join(kinds)}"
