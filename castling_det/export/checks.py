"""What an exported detector must pass: no softmax attention in its graph, and MMDetection's own detections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import ExportedProgram

from castling_det.export.inputs import Shape, example_images
from castling_det.export.network import DeployedDetector
from castling_det.runtime.metadata import OUTPUT_NAMES

__all__ = ["TOLERANCES", "Runner", "ShapeParity", "check_linear_only", "check_parity", "compare", "reference"]

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Runner = Callable[[Array, Array | None], Outputs]
"""Images (B, 3, H, W) and sizes (B, 2) or None, float32, to the outputs by name."""


def check_linear_only(program: ExportedProgram) -> None:
    """Refuses a program with softmax attention: any softmax in the backbone, and fused or masked attention anywhere.

    A plain softmax in a head is allowed: GFL has one over the bins of its boxes.
    """
    left = []
    for node in program.graph.nodes:
        operator = str(node.target)
        path = "".join(f".{name}" for name, _ in list((node.meta.get("nn_module_stack") or {}).values())[-1:])
        fused = any(name in operator for name in ("scaled_dot_product", "masked_softmax", "multi_head_attention"))
        if node.op == "call_function" and (fused or ("softmax" in operator and ".backbone" in path)):
            left.append(f"{path.removeprefix('.')} ({operator})")
    if left:
        raise ValueError(
            f"{len(left)} softmax attentions are left in the graph, in {', '.join(left[:3])}"
            f"{', ...' if len(left) > 3 else ''}: only linear attention is deployed; convert the checkpoint with "
            "tools/convert.py and give its deploy config"
        )


@dataclass(frozen=True)
class Tolerance:
    """How much an exported detector may differ from PyTorch in float32."""

    raw: float
    """Largest difference of a head's map, over the map's root mean square."""
    box: float
    """Pixels between a detection and its partner."""
    score: float
    unmatched: float
    """Share of detections without a partner of their class within `box` and `score`. It is not zero: rounding decides
    which of two boxes is left where their overlap is just the threshold of suppression."""

    def line(self) -> str:
        """For people."""
        return f"within maps {self.raw:g}, boxes {self.box:g} px, scores {self.score:g}, {self.unmatched:.0%} unmatched"


TOLERANCES: dict[str, Tolerance | None] = {
    "float32": Tolerance(raw=1e-3, box=0.1, score=1e-3, unmatched=0.01),
    "float16": Tolerance(raw=0.05, box=2.0, score=0.02, unmatched=0.1),
    # Quantised weights are another function; its mAP says how good it is.
    "int8": None,
}


@dataclass(frozen=True)
class ShapeParity:
    """The differences at one shape; `detections` are the reference's, `unmatched` those of either side."""

    shape: Shape
    raw: float
    detections: int
    unmatched: int
    box: float
    score: float

    def problems(self, tolerance: Tolerance) -> list[str]:
        """What is above the tolerance; NaN is."""
        found = [] if self.raw <= tolerance.raw else [f"maps {self.raw:.3g} > {tolerance.raw:g}"]
        if not self.unmatched <= tolerance.unmatched * 2 * max(self.detections, 1):
            found.append(f"{self.unmatched} unmatched of {self.detections} detections")
        return found

    def line(self) -> str:
        """For people."""
        batch, height, width = self.shape
        return (
            f"{batch} x {height} x {width}: maps {self.raw:.1e}, {self.detections} detections, "
            f"{self.unmatched} unmatched, boxes {self.box:.1e} px, scores {self.score:.1e}"
        )


def default_shapes(network: DeployedDetector) -> tuple[Shape, ...]:
    """Three shapes, none of which was traced: a tall, a wide and a square one, each of another batch."""
    unit, least = network.normalization.pad_size_divisor, network.min_units
    return (
        (1, (least + 3) * unit, (least + 1) * unit),
        (3, least * unit, (least + 5) * unit),
        (2, (least + 6) * unit, (least + 6) * unit),
    )


def example_sizes(network: DeployedDetector, shape: Shape) -> Tensor:
    """Height and width of each image without padding, (B, 2): the first has none, each further one has more of it."""
    batch, height, width = shape
    part = network.normalization.pad_size_divisor / 4
    return torch.tensor([[height - index * part, width - 2 * index * part] for index in range(batch)])


def reference(detector: nn.Module, images: Tensor, sizes: Tensor, *, preprocessing: bool = True) -> dict[str, Any]:
    """MMDetection's predictions as an exported file names them, without masks; arguments as `DeployedDetector`'s."""
    model: Any = copy.deepcopy(detector)
    if getattr(model, "roi_head", None) is not None and model.roi_head.with_mask:
        model.roi_head.mask_head = None
    info = dict(pad_shape=tuple(images.shape[-2:]), batch_input_shape=tuple(images.shape[-2:]), scale_factor=(1.0, 1.0))
    infos = [dict(info, img_shape=tuple(size), ori_shape=tuple(size)) for size in sizes.tolist()]
    data: dict[str, Any] = dict(inputs=images, data_samples=[DetDataSample(metainfo=info) for info in infos])
    with torch.no_grad():
        if preprocessing:
            data = model.data_preprocessor({**data, "inputs": list(images)}, False)
        features = model.extract_feat(data["inputs"])
        samples = model.predict(data["inputs"], data["data_samples"], rescale=False)
        prefix, head = ("rpn_", model.rpn_head) if getattr(model, "rpn_head", None) else ("", model.bbox_head)
        scores, boxes = head(features)
    found = [sample.pred_instances for sample in samples]
    rows = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    outputs = {
        "boxes": rows([one.bboxes.float() for one in found]),
        "scores": rows([one.scores.float() for one in found]),
        "labels": rows([one.labels for one in found], padding_value=-1),
        **{f"raw_{prefix}cls_score_{level}": value.float() for level, value in enumerate(scores)},
        **{f"raw_{prefix}bbox_pred_{level}": value.float() for level, value in enumerate(boxes)},
    }
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def check_parity(
    detector: nn.Module, network: DeployedDetector, run: Runner, shapes: Sequence[Shape], tolerance: Tolerance | None
) -> tuple[ShapeParity, ...]:
    """Runs both at every shape; ValueError with all differences above the tolerance."""
    results = []
    for seed, shape in enumerate(shapes):
        images, sizes = example_images(network, shape, seed=seed + 1), example_sizes(network, shape)
        expected = reference(detector, images, sizes, preprocessing=network.preprocessing)
        results.append(compare(expected, run(images.numpy(), sizes.numpy()), shape, tolerance))
    problems = {result.line(): result.problems(tolerance) for result in results} if tolerance else {}
    if wrong := [f"{line} ({', '.join(found)})" for line, found in problems.items() if found]:
        raise ValueError(f"parity: differs from PyTorch beyond the tolerance at {'; '.join(wrong)}")
    return tuple(results)


def compare(expected: Outputs, found: Outputs, shape: Shape, tolerance: Tolerance | None = None) -> ShapeParity:
    """The differences of outputs: maps by element, detections by partners within `tolerance` (None: half a box)."""
    raw = [_relative(value, found[name]) for name, value in expected.items() if name.startswith("raw_")]
    detections = unmatched = 0
    box = score = 0.0
    for image in range(shape[0] if "boxes" in found else 0):
        theirs, ours = ([outputs[name][image] for name in OUTPUT_NAMES] for outputs in (expected, found))
        pairs = _partners(theirs, ours, tolerance)
        counts = [int((scores > 0).sum()) for _, scores, _ in (theirs, ours)]
        detections += counts[0]
        unmatched += sum(counts) - 2 * len(pairs)
        for a, b in pairs:
            box = max(box, float(np.abs(theirs[0][a] - ours[0][b]).max()))
            score = max(score, float(np.abs(theirs[1][a] - ours[1][b])))
    return ShapeParity(shape, max(raw, default=0.0), detections, unmatched, box, score)


def _relative(expected: Array, found: Array) -> float:
    if expected.shape != found.shape:
        return float("inf")
    scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean())) or 1.0
    return float(np.abs(expected.astype(np.float64) - found).max() / scale)


def _partners(theirs: list[Array], ours: list[Array], tolerance: Tolerance | None) -> list[tuple[int, int]]:
    """Pairs of one class: each row of `theirs` (boxes, scores, labels of an image) takes the nearest free of `ours`."""
    free, pairs = ours[1] > 0, []
    for a in np.flatnonzero(theirs[1] > 0).tolist():
        box, score, label = (values[a] for values in theirs)
        apart, other = np.abs(box - ours[0]).max(axis=1), np.abs(score - ours[1])
        limit = max(float(np.max(box[2:] - box[:2])) / 2, 1.0) if tolerance is None else tolerance.box
        near = free & (ours[2] == label) & (apart <= limit) & (tolerance is None or other <= tolerance.score)
        if near.any():
            # Two boxes in one place differ by their scores.
            b = int(np.where(near, apart + 100 * other, np.inf).argmin())
            pairs.append((a, b))
            free[b] = False
    return pairs
