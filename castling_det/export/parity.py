"""An exported detector against MMDetection's own prediction, on images of several sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from numpy.typing import NDArray
from torch import Tensor, nn

from castling_det.export.metadata import OUTPUT_NAMES
from castling_det.export.network import DeployedDetector
from castling_det.export.program import example_images

__all__ = ["TOLERANCES", "ShapeParity", "Tolerance", "check_parity", "compare", "default_shapes", "reference"]

Array = NDArray[Any]
Outputs = Mapping[str, Array]
Runner = Callable[[Array], Outputs]
"""Images (B, 3, H, W) float32 to the outputs by name."""


@dataclass(frozen=True)
class Tolerance:
    """How much an exported detector may differ from PyTorch in float32."""

    raw: float
    """Of a map of the head: largest difference over the map's root mean square."""
    box: float
    """Pixels, of a detection and its partner."""
    score: float
    """Likewise."""
    unmatched: float
    """Share of detections without a partner of the same class within these two, in either direction: where two
    overlap by just the threshold of suppression, rounding decides which of them is left."""


TOLERANCES: dict[str, Tolerance | None] = {
    "float32": Tolerance(raw=1e-3, box=0.1, score=1e-3, unmatched=0.01),
    "float16": Tolerance(raw=0.05, box=2.0, score=0.02, unmatched=0.1),
    # Quantised weights are another function; how good it is, its mAP says.
    "int8": None,
}


@dataclass(frozen=True)
class ShapeParity:
    """The differences at one size."""

    shape: tuple[int, int, int]
    """Batch, height, width."""
    raw: float
    detections: int
    """Of the reference."""
    unmatched: int
    """Detections of either side without a partner."""
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


def default_shapes(network: DeployedDetector) -> tuple[tuple[int, int, int], ...]:
    """Three sizes, none of them that of tracing: a tall, a wide and a square one, each of another batch."""
    unit, least = network.normalization.pad_size_divisor, network.min_units
    return (
        (1, (least + 3) * unit, (least + 1) * unit),
        (3, least * unit, (least + 5) * unit),
        (2, (least + 6) * unit, (least + 6) * unit),
    )


def reference(detector: nn.Module, images: Tensor, *, preprocessing: bool = True) -> dict[str, Array]:
    """What MMDetection predicts: `boxes`, `scores`, `labels` in rows as an exported file has them, and `raw_*` maps."""
    model: Any = detector
    hw = tuple(images.shape[-2:])
    metainfo = dict(img_shape=hw, ori_shape=hw, pad_shape=hw, batch_input_shape=hw, scale_factor=(1.0, 1.0))
    data: dict[str, Any] = dict(inputs=images, data_samples=[DetDataSample(metainfo=metainfo) for _ in images])
    with torch.no_grad():
        if preprocessing:
            data = model.data_preprocessor({**data, "inputs": list(images)}, False)
        features = model.extract_feat(data["inputs"])
        samples = model.predict(data["inputs"], data["data_samples"], rescale=False)
        raw = _raw(model, features)
    rows = max((len(sample.pred_instances) for sample in samples), default=0)
    boxes, scores = np.zeros((len(images), rows, 4), np.float32), np.zeros((len(images), rows), np.float32)
    labels = np.full((len(images), rows), -1)
    for index, sample in enumerate(samples):
        found = sample.pred_instances
        boxes[index, : len(found)] = found.bboxes.float().cpu().numpy()
        scores[index, : len(found)] = found.scores.float().cpu().numpy()
        labels[index, : len(found)] = found.labels.cpu().numpy()
    return {**dict(zip(OUTPUT_NAMES, (boxes, scores, labels), strict=True)), **raw}


def without_masks(detector: nn.Module) -> nn.Module:
    """A copy that predicts boxes alone."""
    copied: Any = copy.deepcopy(detector)
    if getattr(copied, "roi_head", None) is not None and copied.roi_head.with_mask:
        copied.roi_head.mask_head = None
    model: nn.Module = copied
    return model


def _raw(model: Any, features: Sequence[Tensor]) -> dict[str, Array]:
    if getattr(model, "encoder", None) is not None:
        # A transformer's outputs are rows of queries, which come in an order of their own.
        return {}
    prefix, head = ("rpn_", model.rpn_head) if getattr(model, "rpn_head", None) else ("", model.bbox_head)
    scores, boxes = head(features)
    maps = {f"raw_{prefix}cls_score_{level}": value for level, value in enumerate(scores)}
    maps |= {f"raw_{prefix}bbox_pred_{level}": value for level, value in enumerate(boxes)}
    return {name: value.float().cpu().numpy() for name, value in maps.items()}


def check_parity(
    detector: nn.Module,
    network: DeployedDetector,
    run: Runner,
    shapes: Sequence[tuple[int, int, int]],
    tolerance: Tolerance | None,
) -> tuple[ShapeParity, ...]:
    """Runs both at every shape.

    Raises:
        ValueError: a difference above the tolerance, with all of them.
    """
    detector = without_masks(detector)
    results = []
    for seed, shape in enumerate(shapes):
        images = example_images(network, shape, seed=seed + 1)
        expected = reference(detector, images, preprocessing=network.preprocessing)
        results.append(compare(expected, run(images.numpy()), shape, tolerance))
    problems = [
        f"{result.line()} ({', '.join(found)})"
        for result in results
        if tolerance is not None and (found := result.problems(tolerance))
    ]
    if problems:
        raise ValueError("parity: differs from PyTorch beyond the tolerance at " + "; ".join(problems))
    return tuple(results)


def compare(
    expected: Outputs, found: Outputs, shape: tuple[int, int, int], tolerance: Tolerance | None = None
) -> ShapeParity:
    """The differences between two sets of outputs, maps element by element, detections by their partners.

    Args:
        expected, found: outputs by name. shape: batch, height, width of the images.
        tolerance: how far apart partners may be; None: by half of their box.
    """
    raw = [_relative(value, found[name]) for name, value in expected.items() if name.startswith("raw_")]
    detections = unmatched = 0
    box = score = 0.0
    if "boxes" in found:
        for image in range(shape[0]):
            ours, theirs = ({name: outputs[name][image] for name in OUTPUT_NAMES} for outputs in (found, expected))
            pairs, counts = _partners(theirs, ours, tolerance)
            detections += counts[0]
            unmatched += sum(counts) - 2 * len(pairs)
            for a, b in pairs:
                box = max(box, float(np.abs(theirs["boxes"][a] - ours["boxes"][b]).max()))
                score = max(score, float(np.abs(theirs["scores"][a] - ours["scores"][b])))
    return ShapeParity(shape, max(raw, default=0.0), detections, unmatched, box, score)


def _relative(expected: Array, found: Array) -> float:
    if expected.shape != found.shape:
        return float("inf")
    scale = float(np.sqrt(np.square(expected, dtype=np.float64).mean())) or 1.0
    return float(np.abs(expected.astype(np.float64) - found).max() / scale)


def _partners(
    theirs: Outputs, ours: Outputs, tolerance: Tolerance | None
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Pairs of one class that are nearest to one another, and how many rows each side has."""
    first, second = np.flatnonzero(theirs["scores"] > 0), np.flatnonzero(ours["scores"] > 0)
    free, pairs = set(second.tolist()), []
    for a in first.tolist():
        box, score, label = (theirs[name][a] for name in OUTPUT_NAMES)
        limit = max(float(np.max(box[2:] - box[:2])) / 2, 1.0) if tolerance is None else tolerance.box
        costs: dict[int, float] = {}
        for b in free:
            apart = float(np.abs(box - ours["boxes"][b]).max())
            other = abs(float(score - ours["scores"][b]))
            if label == ours["labels"][b] and apart <= limit and (tolerance is None or other <= tolerance.score):
                # Two boxes in one place differ by their scores.
                costs[b] = apart + 100 * other
        if costs:
            best = min(costs, key=costs.__getitem__)
            pairs.append((a, best))
            free.discard(best)
    return pairs, (len(first), len(second))
