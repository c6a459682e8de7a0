"""The network to be exported, in eager mode: MMDetection's own detections, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from castling_det.export.checks import compare, default_shapes, example_sizes, reference
from castling_det.export.inputs import example_images
from castling_det.export.network import DeployedDetector
from castling_det.export.selection import Detections, keep_by_nms, select
from tests.export.conftest import MODELS


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


def test_families_without_an_exported_form_are_refused(tiny):
    _, detector = tiny("gfl_vit")
    detector.__class__ = type("Unknown", (torch.nn.Module,), {})
    with pytest.raises(ValueError, match=r"Unknown: expected a single-stage detector .* no other family is exported"):
        DeployedDetector(detector)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(nms=dict(type="soft_nms", iou_threshold=0.5)), r"test_cfg\.nms=.*expected dict\(type='nms'"),
        (dict(max_per_img=-1), r"test_cfg\.max_per_img=-1: expected a positive number"),
    ],
)
def test_settings_without_an_exported_form_are_refused(tiny, settings, message):
    _, detector = tiny("gfl_vit")
    detector.test_cfg = {**detector.test_cfg, **settings}
    with pytest.raises(ValueError, match=message):
        DeployedDetector(detector)


def test_a_detector_in_training_mode_is_refused(tiny):
    _, detector = tiny("gfl_vit")
    with pytest.raises(ValueError, match="training mode; call eval"):
        DeployedDetector(detector.train())
