"""A detector in an ONNX file that says what it sees, without a training: the reddest pixel of an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "data" / "tree_crowns"
FULL = REAL / "full" / "2019_YELL_2_541000_4977000_image_crop.png"
HALF_SIDE = 4.0
"""Of the box around the reddest pixel, in pixels of the input."""

METADATA = {
    "format": "1",
    "version": "0.1.0",
    "outputs": "detections",
    "preprocessing": "graph",
    "classes": ["leaf", "spot"],
    "mean": [0.0, 116.25, 103.5],
    "std": [1.0, 1.0, 1.0],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
    "pad_values": [103.5, 116.25, 0.0],
    "input_size": [64, 64],
    "keep_ratio": True,
    "pipeline": [{"type": "Resize", "scale": [64, 64], "keep_ratio": True, "interpolation": "bilinear"}],
    "score_thr": 0.05,
    "nms_iou": 0.6,
    "max_per_img": 2,
    "opset": 17,
    "precision": "float32",
    "attention": "linear",
    "detector": "Spot",
    "source_sha256": "0" * 64,
    "config": "spot.py",
    "created": "2025-01-01T00:00:00+00:00",
}

FORMATS = {
    "png": dict(format="PNG"),
    "jpeg": dict(format="JPEG", exif=b"Exif\0\0" + b"\xff" * 99),
    "progressive": dict(format="JPEG", progressive=True),
    "bmp": dict(format="BMP"),
    "tiff": dict(format="TIFF", compression="tiff_lzw"),
    "bigtiff": dict(format="TIFF", big_tiff=True),
    "webp": dict(format="WEBP"),
    "lossless webp": dict(format="WEBP", lossless=True),
    "extended webp": dict(format="WEBP", exif=b"Exif\0\0II*\0" + bytes(20)),
}
"""What detection reads, as arguments of PIL's `save`."""

needs_data = pytest.mark.skipif(not FULL.is_file(), reason="run make data")


def spot_model(
    path, *, channels=3, output_names=("boxes", "scores", "labels"), half_side=HALF_SIDE, label=1, texts=None, **changes
):
    """Writes the file: a box around the maximum of channel 2, its value / 255, its label; a row of padding.

    `changes` are metadata values, of which None is left out; `texts` are metadata that are no JSON values.
    """
    integers = {
        "shape": [0, -1], "two": [2], "three": [3], "one": [1], "label": label, "minus": -1,
        "box_pads": [0, 0, 0, 0, 1, 0], "row_pads": [0, 0, 0, 1],
    }  # fmt: skip
    floats = {"middle": 0.5, "corner": [-half_side, -half_side, half_side, half_side], "scale": 255.0}
    constants = {name: np.array(value, dtype=np.int64) for name, value in integers.items()}
    constants |= {name: np.array(value, dtype=np.float32) for name, value in floats.items()}
    node = helper.make_node
    nodes = [
        node("Slice", ["images", "two", "three", "one"], ["red"]),
        node("Reshape", ["red", "shape"], ["flat"]),
        node("ArgMax", ["flat"], ["at"], axis=1, keepdims=1),
        node("ReduceMax", ["flat"], ["peak"], axes=[1], keepdims=1),
        node("Shape", ["images"], ["width"], start=3, end=4),
        node("Mod", ["at", "width"], ["x"]),
        node("Div", ["at", "width"], ["y"]),
        node("Concat", ["x", "y", "x", "y"], ["pixel"], axis=1),
        node("Cast", ["pixel"], ["pixel_float"], to=TensorProto.FLOAT),
        node("Add", ["pixel_float", "middle"], ["centre"]),
        node("Add", ["centre", "corner"], ["box"]),
        node("Unsqueeze", ["box", "one"], ["row"]),
        node("Pad", ["row", "box_pads"], ["boxes"]),
        node("Div", ["peak", "scale"], ["score"]),
        node("Pad", ["score", "row_pads"], ["scores"]),
        node("Sub", ["at", "at"], ["zero"]),
        node("Add", ["zero", "label"], ["found"]),
        node("Pad", ["found", "row_pads", "minus"], ["labels"]),
    ]
    shapes = {"boxes": ("batch", 2, 4), "scores": ("batch", 2), "labels": ("batch", 2)}
    kinds = {"boxes": TensorProto.FLOAT, "scores": TensorProto.FLOAT, "labels": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "spot",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("batch", channels, "height", "width"))],
        [helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in output_names],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    values = {name: value for name, value in {**METADATA, **changes}.items() if value is not None or name == "nms_iou"}
    properties = {**{name: json.dumps(value) for name, value in values.items()}, **(texts or {})}
    helper.set_model_props(model, {f"castling_det.{name}": text for name, text in properties.items()})
    onnx.save(model, str(path))
    return path


@pytest.fixture
def model(tmp_path):
    """The file with its usual metadata."""
    return spot_model(tmp_path / "spot.onnx")


def photo(hw=(48, 64), spot=(20, 40), red=250, seed=0):
    """Noise without much red, bright in blue, and one red pixel of 3 x 3 at `spot` (y, x)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)
    pixels[:, :, 2] //= 4
    if spot is not None:
        y, x = spot
        pixels[y - 1 : y + 2, x - 1 : x + 2, 2] = red
    return pixels
