"""The network to be exported, in eager mode: MMDetection's own detections, for every family."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from castling_det.export.checks import compare, default_shapes, example_sizes, reference
from castling_det.export.inputs import example_images
from castling_det.export.network import DeployedDetector, keep_sizes_simple
from castling_det.export.selection import Detections, keep_by_nms, select
from tests.export.conftest import MODELS

GEOMETRIES = [(7, 4, 3), (3, 2, 1), (3, 4, 1), (3, 8, 1), (5, 2, 2), (2, 2, 0), ((3, 5), (2, 4), (1, 2))]


def outputs(network, images, sizes=None):
    with torch.no_grad():
        return {name: value.numpy() for name, value in network(images, sizes).items()}


@pytest.mark.parametrize("family", MODELS)
def test_every_family_predicts_what_mmdetection_predicts(tiny, family):
    """On images of which all but the first are padded."""
    _, detector = tiny(family)
    network = DeployedDetector(detector).eval()
    assert network.settings.max_per_img == 30
    for seed, shape in enumerate(default_shapes(network)):
        images, sizes = example_images(network, shape, seed=seed), example_sizes(network, shape)
        result = compare(reference(detector, images, sizes), outputs(network, images, sizes), shape)
        assert result.detections >= 10 and result.unmatched == 0, result.line()
        # BatchNorm is folded: rounding differs.
        assert result.raw < 1e-4 and result.box < 1e-2 and result.score < 1e-4, result.line()


def test_the_comparison_sees_a_wrong_class_a_shift_and_a_lost_box(tiny):
    """Negative control of the test above."""
    _, detector = tiny("gfl_vit")
    network = DeployedDetector(detector).eval()
    shape = (1, 96, 64)
    images = example_images(network, shape)
    expected = reference(detector, images, torch.tensor([[96.0, 64.0]]))
    for name, change in {
        "labels": lambda x: np.where(x >= 0, (x + 1) % 3, x),
        "boxes": lambda x: x[..., [1, 0, 3, 2]],
        "scores": lambda x: np.where(np.arange(x.shape[1]) == 0, 0, x),
        "raw_cls_score_0": lambda x: x[:, ::-1],
    }.items():
        found = outputs(network, images)
        found[name] = change(found[name]).astype(found[name].dtype)
        result = compare(expected, found, shape)
        assert result.unmatched or result.raw > 0.1 or result.box > 1, name


def test_without_preprocessing_normalised_images_give_the_same(tiny):
    _, detector = tiny("gfl_vit")
    images = example_images(DeployedDetector(detector).eval(), (1, 96, 64))
    whole = outputs(DeployedDetector(detector).eval(), images)
    inputs = detector.data_preprocessor({"inputs": list(images)}, False)["inputs"]
    bare = outputs(DeployedDetector(detector, preprocessing=False).eval(), inputs)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_allclose(bare[name], whole[name], atol=1e-3)


def test_rows_without_a_detection_are_empty():
    scores = torch.tensor([[0.2, 0.0, 0.9]])
    boxes = torch.arange(12.0).view(1, 3, 4)
    found = select(Detections(boxes, scores, torch.tensor([[5, 6, 7]])), 4)
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.2, 0.0, 0.0]]))
    assert found.labels.tolist() == [[7, 5, -1, -1]]
    torch.testing.assert_close(found.boxes[0, :2], boxes[0, [2, 0]])
    assert not found.boxes[0, 2:].any()


def test_suppression_stays_within_image_and_class():
    box = torch.tensor([10.0, 10.0, 20.0, 20.0])
    boxes = box.expand(2, 3, 4).clone()
    boxes[1, 2] += 50
    scores = torch.zeros(2, 2, 3)
    scores[:, 0, 0], scores[:, 0, 1], scores[:, 1, 2] = 0.5, 0.8, 0.4
    scores[1, 1, 1] = 0.3
    kept = keep_by_nms(boxes, scores, 0.5)
    assert kept.tolist() == [
        [[False, True, False], [False, False, True]],
        [[False, True, False], [False, True, True]],
    ]


def test_nothing_above_the_threshold_gives_empty_rows(tiny):
    _, detector = tiny("gfl_vit")
    network = DeployedDetector(detector).eval()
    with torch.no_grad():
        network.detector.bbox_head.gfl_cls.bias.fill_(-30)
    found = outputs(network, example_images(network, (2, 64, 96)))
    assert not found["scores"].any() and (found["labels"] == -1).all()


def test_padding_values_become_zero(tiny):
    network = DeployedDetector(tiny("gfl_vit")[1]).eval()
    seen = []
    network.detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.tensor(network.normalization.pad_values).view(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert not seen[0].any()


def retyped(detector):
    detector.__class__ = type("Unknown", (torch.nn.Module,), {})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.test_cfg.update(nms=dict(type="soft_nms")), r"test_cfg\.nms=.*expected dict\(type='nms'"),
        (lambda x: x.test_cfg.update(max_per_img=-1), r"test_cfg\.max_per_img=-1: expected a positive number"),
        (lambda x: x.train(), "training mode; call eval"),
        (retyped, r"Unknown: expected a single-stage detector .* no other family is exported"),
    ],
)
def test_detectors_without_an_exported_form_are_refused(tiny, change, message):
    _, detector = tiny("gfl_vit")
    change(detector)
    with pytest.raises(ValueError, match=message):
        DeployedDetector(detector)


@pytest.mark.parametrize("kernel, stride, padding", GEOMETRIES)
@pytest.mark.parametrize("unit", [8, 12])
def test_an_exported_convolution_gives_the_same_at_any_multiple(kernel, stride, padding, unit):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding))
    simple = copy.deepcopy(plain)
    keep_sizes_simple(simple)
    rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
    program = torch.export.export(
        simple, (torch.randn(2, 3, 2 * unit, 3 * unit),), dynamic_shapes=({2: unit * rows, 3: unit * columns},),
        strict=False,
    )  # fmt: skip
    for size in [(2 * unit, 3 * unit), (5 * unit, 4 * unit)]:
        x = torch.randn(2, 3, *size)
        for function in (simple, program.module()):
            torch.testing.assert_close(function(x), plain(x))
    if unit == 8:
        (shape,) = [node.meta["val"].shape for node in program.graph.nodes if "conv2d" in node.name]
        assert "//" not in str(shape[2]) and "//" not in str(shape[3]), shape


def test_a_side_that_the_stride_does_not_divide_keeps_its_rounding():
    plain = nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1))
    expected = plain(torch.ones(1, 1, 7, 9))
    keep_sizes_simple(plain)
    torch.testing.assert_close(plain(torch.ones(1, 1, 7, 9)), expected, rtol=0, atol=0)


def test_only_plain_strided_convolutions_are_taken():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(
        Own(1, 1, 3, 2), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, 2, dilation=2), nn.Conv2d(1, 1, 3, 2, padding="valid")
    )
    before = [type(layer) for layer in model]
    keep_sizes_simple(model)
    assert [type(layer) for layer in model] == before
