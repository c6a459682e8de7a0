"""A network as an ONNX graph: traced, translated, trimmed to its outputs, quantised, and run by onnxruntime."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from castling_det.export.checks import Runner
from castling_det.export.inputs import example_images, example_shape
from castling_det.export.network import DeployedDetector
from castling_det.runtime.metadata import INPUT_NAME, OUTPUT_NAMES, SIZES_NAME

__all__ = ["DEFAULT_OPSET", "finished", "onnx_model", "onnx_runner", "trace"]

DEFAULT_OPSET = 20
"""Of ONNX 1.15 (October 2023): the first with GELU as one operator."""


def trace(network: DeployedDetector) -> ExportedProgram:
    """The program for any batch, height and width, the sides multiples of `pad_size_divisor`; else ValueError."""
    shape, unit = example_shape(network), network.normalization.pad_size_divisor
    batch, rows, columns = (Dim(name, min=1) for name in ("batch", "rows", "columns"))
    images, sizes = example_images(network, shape), torch.tensor([shape[1:]] * shape[0], dtype=torch.float32)
    dynamic = ({0: batch, 2: unit * rows, 3: unit * columns}, {0: batch})
    try:
        with torch.no_grad():
            return torch.export.export(network, (images, sizes), dynamic_shapes=dynamic, strict=False)
    except torch._dynamo.exc.UserError as error:
        raise ValueError(f"the detector's graph is not the same for all sizes: {error}") from error


def onnx_model(program: ExportedProgram, *, opset: int = DEFAULT_OPSET) -> Any:
    """The program as an onnx.ModelProto, with module names in the nodes' metadata; ValueError where none exists."""
    spec = program.call_spec.out_spec
    assert spec is not None and isinstance(spec.context, list)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        # The exporter prints its progress, with marks that not every terminal has.
        with open(os.devnull, "w", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT_NAME, SIZES_NAME],
                output_names=[str(name) for name in spec.context],  # the keys of the dict that the module returned
                custom_translation_table={torch.ops.castling_det.kept_by_nms.default: _kept_by_nms},
                verify=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"opset {opset}: the detector has no ONNX form: {str(error).splitlines()[0]}") from error
    assert exported is not None
    model = exported.model_proto
    found = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if found != opset:
        raise ValueError(f"opset={opset}: the exporter wrote opset {found}; give --opset {found}")
    return model


def finished(model: Any, outputs: list[str], *, int8: bool, properties: dict[str, str]) -> Any:
    """A copy with those outputs alone, with our metadata and a default for the sizes; `int8` quantises linear layers.

    The exporter's metadata are removed: they have paths of this machine.
    """
    import onnx

    parts = onnx.utils.Extractor(model)
    inputs = [INPUT_NAME, *([SIZES_NAME] if OUTPUT_NAMES[0] in outputs else [])]
    copied = type(model)()
    copied.CopyFrom(parts.extract_model(inputs, outputs))
    # The matrix products of `nn.Linear`, by the metadata that are removed below.
    layers = [
        node.name
        for node in copied.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and any(
            "torch.nn.modules.linear.Linear'" in entry.value
            for entry in node.metadata_props
            if entry.key == "pkg.torch.onnx.class_hierarchy"
        )
    ]
    graph = copied.graph
    for owner in (copied, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    if int8:
        copied = _quantised(copied, layers)
    if SIZES_NAME in inputs:
        # Larger than any image: by default nothing is padding. One row serves any batch.
        default = onnx.numpy_helper.from_array(np.full((1, 2), 2.0**24, np.float32), SIZES_NAME)
        copied.graph.initializer.append(default)
        copied.graph.input[1].type.tensor_type.shape.dim[0].Clear()
    onnx.helper.set_model_props(copied, properties)
    return copied


def onnx_runner(model: bytes | str | Path, *, threads: int = 0) -> Runner:
    """The file, or its bytes, as a function of images and sizes on the CPU; ValueError if it does not load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has an exception of its own for each kind of fault
        raise ValueError(f"onnxruntime does not load the exported file: {error}") from error
    names = [output.name for output in session.get_outputs()]

    def run(images: Any, sizes: Any = None) -> dict[str, Any]:
        given = {INPUT_NAME: images} if sizes is None else {INPUT_NAME: images, SIZES_NAME: sizes}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _quantised(model: Any, layers: Sequence[str]) -> Any:
    """A copy whose `layers` have int8 weights, one scale a channel, and inputs that are quantised as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if not layers:
        raise ValueError("precision='int8': the graph has no linear layer to quantise; export float32 instead")
    # onnxruntime advises to preprocess, which would merge nodes and lose their names.
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantised.onnx"
            quantize_dynamic(
                model,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                # A Gemm becomes a product and a sum first, with this suffix.
                nodes_to_quantize=[*layers, *(f"{name}_MatMul" for name in layers)],
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


def _kept_by_nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    from onnxscript import opset18

    # Typed by the values that are not known while a graph is written.
    op: Any = opset18
    most, least = op.Constant(value_ints=[2**63 - 1]), op.Constant(value_floats=[0.0])  # all boxes of each class
    kept = op.NonMaxSuppression(boxes, scores, most, op.Constant(value_floats=[iou_threshold]), least)
    nowhere = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
    return op.Greater(op.ScatterND(nowhere, kept, ones), op.Constant(value_float=0.5))
