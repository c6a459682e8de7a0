"""Dynamic int8 quantisation of the linear layers, by onnxruntime."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["quantised"]


def quantised(model: Any, layers: Sequence[str]) -> Any:
    """A copy whose `layers` have int8 weights, one scale a channel, and inputs that are quantised as they come.

    Args:
        model: onnx.ModelProto.
        layers: names of the nodes; all others stay as they are, the attention's products among them.

    Raises:
        ValueError: none of them is in the graph.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    present = {node.name for node in model.graph.node}
    chosen = [name for name in layers if name in present]
    if not chosen:
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
                nodes_to_quantize=[*chosen, *(f"{name}_MatMul" for name in chosen)],
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)
