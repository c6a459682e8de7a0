"""A traced program as an ONNX file, and an ONNX file as a function of images."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from castling_det.export.metadata import INPUT_NAME

__all__ = ["DEFAULT_OPSET", "linear_layers", "onnx_model", "onnx_runner", "with_outputs"]

DEFAULT_OPSET = 20
"""Of ONNX 1.15 (October 2023), read by onnxruntime from 1.17 on: the first with GELU as one operator."""
_INT64_MAX = 2**63 - 1
_CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"


def onnx_model(program: ExportedProgram, *, opset: int = DEFAULT_OPSET) -> Any:
    """The program as an onnx.ModelProto, with the names of its modules in the nodes' metadata.

    Raises:
        ValueError: an operator that has no ONNX form in this opset.
    """
    names = list(program.graph_signature.user_outputs)
    outputs = _output_names(program)
    assert len(names) == len(outputs)
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
                input_names=[INPUT_NAME],
                output_names=outputs,
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


def linear_layers(model: Any) -> list[str]:
    """Names of the matrix products of `nn.Linear`; before the nodes' metadata is removed."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and any(
            entry.key == _CLASS_HIERARCHY and "torch.nn.modules.linear.Linear'" in entry.value
            for entry in node.metadata_props
        )
    ]


def with_outputs(model: Any, keep: Callable[[str], bool], properties: dict[str, str]) -> Any:
    """A copy with those outputs alone and nothing that they do not need, and our metadata in place of the exporter's.

    The exporter's has the paths of the source files on this machine.
    """
    import onnx

    model = _copied(model)
    graph = model.graph
    kept = [output for output in graph.output if keep(output.name)]
    del graph.output[:]
    graph.output.extend(kept)
    _drop_unneeded(graph)
    for owner in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del owner.metadata_props[:]
        owner.doc_string = ""
    onnx.helper.set_model_props(model, properties)
    return model


def onnx_runner(model: bytes | str | Path, *, threads: int = 0) -> Callable[[Any], dict[str, Any]]:
    """The file, or its bytes, as a function of images (B, 3, H, W) on the CPU.

    Raises:
        ValueError: onnxruntime does not load it.
    """
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

    def run(images: Any) -> dict[str, Any]:
        return dict(zip(names, session.run(names, {INPUT_NAME: images}), strict=True))

    return run


def _output_names(program: ExportedProgram) -> list[str]:
    """The keys of the dict that the module returned, in the order of the outputs."""
    spec = program.call_spec.out_spec
    assert spec is not None and isinstance(spec.context, list)
    return [str(name) for name in spec.context]


def _kept_by_nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
    from onnxscript import opset18

    # Typed by the values that are not known while a graph is written.
    op: Any = opset18

    kept = op.NonMaxSuppression(
        boxes,
        scores,
        op.Constant(value_ints=[_INT64_MAX]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )
    nowhere = op.Expand(op.Constant(value_float=0.0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_float=1.0), op.Shape(kept, start=0, end=1))
    return op.Greater(op.ScatterND(nowhere, kept, ones), op.Constant(value_float=0.5))


def _copied(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _drop_unneeded(graph: Any) -> None:
    needed = {output.name for output in graph.output}
    nodes: list[Any] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    for field, kept in (
        (graph.node, nodes[::-1]),
        (graph.initializer, [entry for entry in graph.initializer if entry.name in needed]),
    ):
        _replace(field, kept)
    produced = {name for node in graph.node for name in node.output}
    _replace(graph.value_info, [entry for entry in graph.value_info if entry.name in produced])


def _replace(field: Any, entries: Sequence[Any]) -> None:
    copies = [type(entry)() for entry in entries]
    for copy, entry in zip(copies, entries, strict=True):
        copy.CopyFrom(entry)
    del field[:]
    field.extend(copies)
