"""torch.export programs and AOTInductor packages of a detector, with the checks of the ONNX file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch.export import ExportedProgram

from castling_det.export.attention_check import check_linear_only
from castling_det.export.export import (
    ExportReport,
    check_out,
    describe,
    example_shape,
    load_source,
    write_checked,
)
from castling_det.export.metadata import FileMetadata
from castling_det.export.network import DeployedDetector
from castling_det.export.parity import TOLERANCES, Runner, ShapeParity, check_parity, default_shapes
from castling_det.export.program import check_torch, export_program

__all__ = ["KINDS", "export_package", "load_package", "read_metadata"]

KINDS = ("program", "aoti")
_METADATA_FILE = "castling_det.json"


def export_package(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    kind: str,
    preprocessing: bool = True,
    precision: str = "float32",
    shapes: Sequence[tuple[int, int, int]] | None = None,
    allow_head_softmax: bool = False,
) -> ExportReport:
    """Writes `out`, a `.pt2` file, after it has passed its checks; on any refusal nothing is written.

    Args:
        kind: `"program"`: torch.export's, for any device and for further compilers. `"aoti"`: compiled by
            AOTInductor for this machine's CPU; needs a C++ compiler here, and torch alone to run.
        config, checkpoint, preprocessing, precision, shapes, allow_head_softmax: as for `export_onnx`; no int8.

    Raises:
        ValueError: unusable files or options, softmax attention in the graph, or a difference from PyTorch.
        OSError: `out` cannot be written. An older `out` is as it was.
    """
    check_torch()
    out = Path(out)
    check_out(out, ".pt2")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}")
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision={precision!r}: expected 'float32' or 'float16'; int8 is for ONNX files")
    source = load_source(config, checkpoint)
    network = DeployedDetector(
        source.detector, preprocessing=preprocessing, half=precision == "float16", nms_as_operator=False
    ).eval()
    program = export_program(network, example_shape(network))
    softmax = check_linear_only(program, allow_in=network.head_attention if allow_head_softmax else ())
    metadata = describe(source, network, raw=False, precision=precision, opset=None)
    results: list[ShapeParity] = []

    def write(part: Path) -> None:
        named = part.with_suffix(".pt2")
        try:
            _save(program, named, kind, metadata)
            named.replace(part)
        finally:
            named.unlink(missing_ok=True)

    def check(part: Path) -> None:
        run = _runner(part, kind)
        tolerance = TOLERANCES[precision]
        results.extend(check_parity(source.detector, network, run, shapes or default_shapes(network), tolerance))

    write_checked(out, write, check)
    return ExportReport(out, out.stat().st_size, metadata, tuple(results), TOLERANCES[precision], softmax)


def load_package(path: str | os.PathLike[str], *, kind: str) -> Runner:
    """A function of images (B, 3, H, W), float32, that returns the outputs by name.

    The kernel of torchvision's NMS must be there: `import torchvision` is all that a program of one's own needs.
    """
    return _runner(Path(path), kind)


def read_metadata(path: str | os.PathLike[str], *, kind: str) -> FileMetadata:
    """What the file says about itself.

    Raises:
        ValueError: not our file, or of another format.
    """
    if kind == "program":
        extra = {_METADATA_FILE: ""}
        with Path(path).open("rb") as file:
            torch.export.load(file, extra_files=extra)
        properties = json.loads(extra[_METADATA_FILE] or "{}")
    else:
        properties = torch._inductor.aoti_load_package(str(path)).get_metadata()
    return FileMetadata.from_properties(properties, path)


def _save(program: ExportedProgram, path: Path, kind: str, metadata: FileMetadata) -> None:
    properties = metadata.to_properties()
    if kind == "program":
        torch.export.save(program, path, extra_files={_METADATA_FILE: json.dumps(properties)})
        return
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": properties}
        )
    except Exception as error:  # a missing compiler, or anything else on its way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"AOTInductor cannot compile the detector: {reason}; it needs a C++ compiler such as g++, the program and "
            "the ONNX file need none"
        ) from error


def _runner(path: Path, kind: str) -> Runner:
    import torchvision  # noqa: F401  # registers NMS

    with torch.no_grad():
        called: Any
        if kind == "program":
            with path.open("rb") as file:
                called = torch.export.load(file).module()
        else:
            called = torch._inductor.aoti_load_package(str(path))

    def run(images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        with torch.no_grad():
            outputs = called(torch.from_numpy(images))
        return {name: value.numpy() for name, value in outputs.items()}

    return run
