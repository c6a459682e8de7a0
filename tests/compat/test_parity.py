"""The stand-ins, called through `mmcv.ops`, against outputs recorded from mmcv's compiled CPU operators."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.testing import assert_close

import castling_det  # noqa: F401  # lets the stand-ins take the place of absent operators, before mmcv.ops

from mmcv.ops import batched_nms, deform_conv2d, modulated_deform_conv2d, nms, roi_align, soft_nms  # isort: skip

RECORDED = Path(__file__).parent / "data" / "mmcv_ops_reference.npz"
EXACT = {"rtol": 0.0, "atol": 0.0}


def load_cases() -> dict[str, dict[str, dict[str, Any]]]:
    """`{case: {"in": {name: value}, "out": {name: value}}}`, arrays as tensors, 0-d arrays as numbers."""
    cases: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: {"in": {}, "out": {}})
    with np.load(RECORDED) as recorded:
        for key in recorded.files:
            if "/" in key:
                case, kind, name = key.rsplit("/", 2)
                value = recorded[key]
                cases[case][kind][name] = value.item() if value.ndim == 0 else torch.from_numpy(value)
    return dict(cases)


CASES = load_cases()


def cases_of(operator: str) -> list[str]:
    return [name for name in CASES if name.split("/")[0] == operator]


def run_roi_align(case: dict[str, Any], **changes: Any) -> tuple[Tensor, Tensor]:
    values = case | changes
    features = values["input"].clone().requires_grad_()
    size = tuple(values["output_size"].tolist())
    output = roi_align(
        features,
        values["rois"],
        size,
        values["spatial_scale"],
        values["sampling_ratio"],
        "avg",
        values["aligned"],
    )
    output.square().sum().backward()
    assert features.grad is not None
    return output.detach(), features.grad


def test_every_recorded_case_is_tested() -> None:
    tested = ("nms", "batched_nms", "soft_nms", "roi_align", "deform_conv2d", "modulated_deform_conv2d")
    assert sum(len(cases_of(operator)) for operator in tested) == len(CASES) == 30


@pytest.mark.parametrize("name", cases_of("nms"))
def test_nms(name: str) -> None:
    dets, keep = nms(**CASES[name]["in"])
    assert_close(keep, CASES[name]["out"]["keep"], **EXACT)
    assert_close(dets, CASES[name]["out"]["dets"], **EXACT)


def test_nms_control_the_offset_matters() -> None:
    case = CASES["nms/n400_iou0.3_offset1"]
    _, keep = nms(**case["in"] | {"offset": 0})
    assert keep.tolist() != case["out"]["keep"].tolist()


def test_nms_compares_with_a_float32_threshold() -> None:
    # An IoU of exactly 3 / 5: float32(0.6) is above 0.6, and mmcv keeps a box that equals the threshold.
    boxes, scores = torch.tensor([[0.0, 0, 4, 1], [1.0, 0, 5, 1]]), torch.tensor([0.9, 0.8])
    assert len(torchvision.ops.nms(boxes, scores, 0.6)) == 1, "the trap that the stand-in avoids is gone"
    assert nms(boxes, scores, 0.6)[1].tolist() == [0, 1]
    assert nms(boxes, scores, 0.59)[1].tolist() == [0]


@pytest.mark.parametrize("name", cases_of("batched_nms"))
def test_batched_nms(name: str) -> None:
    case = CASES[name]["in"]
    dets, keep = batched_nms(
        case["boxes"],
        case["scores"],
        case["idxs"],
        {"type": "nms", "iou_threshold": case["iou_threshold"]},
        class_agnostic=name.endswith("True"),
    )
    assert_close(keep, CASES[name]["out"]["keep"], **EXACT)
    assert_close(dets, CASES[name]["out"]["dets"], **EXACT)


@pytest.mark.parametrize("name", cases_of("soft_nms"))
def test_soft_nms(name: str) -> None:
    dets, keep = soft_nms(**CASES[name]["in"], method=name.split("/")[1])
    assert_close(keep, CASES[name]["out"]["keep"], **EXACT)
    assert_close(dets, CASES[name]["out"]["dets"], rtol=1e-6, atol=1e-7)


def test_soft_nms_control_the_method_matters() -> None:
    recorded = CASES["soft_nms/gaussian"]
    dets, _ = soft_nms(**recorded["in"], method="linear")
    assert (dets - recorded["out"]["dets"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", cases_of("roi_align"))
def test_roi_align(name: str) -> None:
    output, gradient = run_roi_align(CASES[name]["in"])
    assert_close(output, CASES[name]["out"]["output"], **EXACT)
    assert_close(gradient, CASES[name]["out"]["grad_of_sum_of_squares"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [{"aligned": False}, {"sampling_ratio": 1}, {"spatial_scale": 0.126}])
def test_roi_align_control_each_setting_matters(changes: dict[str, Any]) -> None:
    case = CASES["roi_align/aligned_True_ratio2"]
    output, gradient = run_roi_align(case["in"], **changes)
    assert (output - case["out"]["output"]).abs().max() > 1e-3
    assert (gradient - case["out"]["grad_of_sum_of_squares"]).abs().max() > 1e-3


def run_convolution(name: str, offset: Tensor) -> Tensor:
    case = CASES[name]["in"]
    if name == "deform_conv2d":
        return deform_conv2d(case["input"], offset, case["weight"], 1, 1, 1, 1, 1)
    return modulated_deform_conv2d(case["input"], offset, case["mask"], case["weight"], None, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("name", ["deform_conv2d", "modulated_deform_conv2d"])
def test_deformable_convolutions(name: str) -> None:
    offset = CASES[name]["in"]["offset"]
    assert_close(run_convolution(name, offset), CASES[name]["out"]["output"], rtol=1e-5, atol=1e-5)
    x_before_y = offset.unflatten(1, (9, 2)).flip(2).flatten(1, 2)
    assert (run_convolution(name, x_before_y) - CASES[name]["out"]["output"]).abs().max() > 1e-1
