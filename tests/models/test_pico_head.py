"""`PicoHead` and its assignment: published parameter counts, oracles, decoding, empty images."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData
from torch import nn

from castling_det.models import PicoHead, VarifocalSimOTAAssigner
from tests.compare import assert_parity, errors
from tests.models.test_csp_pan import PUBLISHED, separable
from tests.oracles import picodet as oracle

ASSIGNER = dict(type="castling_det.VarifocalSimOTAAssigner")
TEST_CFG = ConfigDict(
    nms_pre=1000, min_bbox_size=0, score_thr=0.025, nms=dict(type="nms", iou_threshold=0.6), max_per_img=100
)
STRIDES = (8, 16, 32, 64)

# PaddleDetection, configs/picodet/legacy_model: PicoHead.conv_feat.num_convs.
STACKED_CONVS = {"s": 2, "m": 4, "l": 4}


def head_params(width, stacked_convs, num_classes=80):
    """A tower and a 1x1 with bias, to scores and 4 distributions of 8 bins, at each of four levels."""
    outputs = num_classes + 4 * 8
    return 4 * (stacked_convs * separable(width) + width * outputs + outputs)


def small(**options):
    defaults = dict(num_classes=3, in_channels=8, feat_channels=8, train_cfg=dict(assigner=ASSIGNER), test_cfg=TEST_CFG)
    return PicoHead(**{**defaults, **options})


def truth_of(boxes, labels, dtype=torch.float64):
    return InstanceData(bboxes=torch.tensor(boxes, dtype=dtype).reshape(-1, 4), labels=torch.tensor(labels).long())


def outputs_of(head, size, seed=0):
    """Random maps as the head gives them for an image of `size`, leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    sides = [[-(-side // stride) for side in size] for stride in STRIDES]
    channels = (head.num_classes, 4 * (head.reg_max + 1))
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return tuple([(1.5 * draw(2, width, *hw)).requires_grad_() for hw in sides] for width in channels)


TRUTHS = [
    # Two boxes that share their middle ask for the same priors; the third is smaller than a stride.
    ([[10, 8, 60, 50], [14, 12, 58, 55], [70.5, 33, 75, 38]], [0, 2, 1]),
    ([[3, 2, 93, 61]], [1]),
]


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_the_published_ones(size):
    _, width = PUBLISHED[size]
    head = PicoHead(80, width, feat_channels=width, stacked_convs=STACKED_CONVS[size])
    assert sum(p.numel() for p in head.parameters()) == head_params(width, STACKED_CONVS[size])


@pytest.mark.parametrize("seed", range(2))
def test_losses_and_gradients_are_those_of_the_equations(seed):
    head = small()
    outputs = outputs_of(head, (64, 96), seed=seed)
    truths = [truth_of(*truth) for truth in TRUTHS]
    actual = head.loss_by_feat(*outputs, truths, [{}, {}])
    pairs = [(truth.bboxes, truth.labels.tolist()) for truth in truths]
    expected, matches = oracle.losses(*outputs, pairs, STRIDES, reg_max=7)
    assert all(sum(j > 0 for j in match) >= len(truth) for match, (_, truth) in zip(matches, TRUTHS, strict=True))
    assert set(actual) == set(expected)
    leaves = [x for maps in outputs for x in maps]
    for name in actual:
        # MMDetection adds the eps of float32 to what it divides by.
        assert_parity(actual[name], expected[name], rms=1e-6, maximum=1e-6, what=name)
        grad = partial(torch.autograd.grad, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradients = (grad(losses[name], leaves) for losses in (actual, expected))
        one, other = (torch.cat([gradient.flatten() for gradient in group]) for group in gradients)
        assert_parity(one, other, rms=1e-6, maximum=1e-5, what=f"gradient of {name}")
    wrong_target, _ = oracle.losses(*outputs, pairs, STRIDES, reg_max=7, target="one")
    wrong_offset, _ = oracle.losses(*outputs, pairs, STRIDES, reg_max=7, offset=0.0)
    assert errors(wrong_target["loss_cls"], expected["loss_cls"])[0] > 1e-3
    assert errors(wrong_offset["loss_dfl"], expected["loss_dfl"])[0] > 1e-3


def test_assignment_is_that_of_the_equations():
    """Random predictions near the boxes, so that many priors are good and some are asked for twice."""
    all_conflicts = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        priors = torch.tensor([[x * 8 + 4, y * 8 + 4, 8, 8] for y in range(8) for x in range(12)]).double()
        corners = torch.rand(4, 2, generator=generator).double() * 40
        truth = torch.cat([corners, corners + 12 + torch.rand(4, 2, generator=generator).double() * 30], dim=1)
        labels = torch.randint(3, (4,), generator=generator)
        noise = torch.randn(len(priors), 4, generator=generator).double() * 6
        boxes = truth[torch.randint(4, (len(priors),), generator=generator)] + noise
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.rand(len(priors), 3, generator=generator).double()
        result = VarifocalSimOTAAssigner().assign(
            InstanceData(priors=priors, bboxes=boxes, scores=scores), InstanceData(bboxes=truth, labels=labels)
        )
        expected, conflicts = oracle.sim_ota(scores, boxes, priors[:, :3].tolist(), truth, labels.tolist())
        assert result.gt_inds.tolist() == expected, f"seed {seed}"
        assert result.labels.tolist() == [labels[j - 1].item() if j else -1 for j in expected]
        all_conflicts += conflicts
    assert all_conflicts > 5


@pytest.mark.parametrize("boxes", [[], [[300, 300, 302, 302]]], ids=str)
def test_without_candidates_nothing_is_assigned(boxes):
    priors = torch.tensor([[x * 8 + 4, y * 8 + 4, 8, 8] for y in range(4) for x in range(4)]).float()
    predictions = InstanceData(priors=priors, bboxes=torch.rand(16, 4).cumsum(1), scores=torch.rand(16, 2))
    result = VarifocalSimOTAAssigner().assign(predictions, truth_of(boxes, [0] * len(boxes), torch.float32))
    assert result.gt_inds.tolist() == [0] * 16 and result.labels.tolist() == [-1] * 16


def certain(*distances):
    """Logits of distributions with all their mass at one distance in strides for each side."""
    return nn.functional.one_hot(torch.tensor(distances), 8).flatten() * 99.0


def test_a_box_is_the_expectation_of_its_distributions():
    head = small().eval()
    scores, boxes = (
        [torch.full((1, width, 64 // stride, 96 // stride), value) for stride in STRIDES]
        for width, value in ((3, -10.0), (32, 0.0))
    )
    scores[0][0, 2, 3, 5] = 2.0
    scores[1][0, 1, 1, 2] = 1.0
    # Level 1: uniform over 0 to 7, and half in each of 2 and 3.
    boxes[0][0, :, 3, 5] = certain(1, 2, 3, 0)
    boxes[1][0, 24:, 1, 2] = torch.tensor([0, 0, 99.0, 99.0, 0, 0, 0, 0])
    (result,) = head.predict_by_feat(scores, boxes, batch_img_metas=[dict(img_shape=(64, 96))])
    expected = [[44 - 8, 28 - 16, 44 + 24, 28], [0, 0, 96, 24 + 40]]
    # 40 - 56 and 24 - 56 are clipped to the image, as 40 + 56 = 96 is not.
    torch.testing.assert_close(result.bboxes, torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)
    assert result.labels.tolist() == [2, 1]
    torch.testing.assert_close(result.scores, torch.tensor([2.0, 1.0]).sigmoid())


@pytest.mark.parametrize("share_cls_reg", [True, False])
@pytest.mark.parametrize("boxes", ["both", "one", "none"])
def test_losses_with_and_without_boxes(boxes, share_cls_reg):
    torch.manual_seed(0)
    head = small(share_cls_reg=share_cls_reg)
    head.init_weights()
    features = [torch.randn(2, 8, 64 // stride, 96 // stride) for stride in STRIDES]
    truths = [truth_of(*truth, dtype=torch.float32) for truth in TRUTHS]
    empty = truth_of([], [], torch.float32)
    truths = {"both": truths, "one": [empty, truths[1]], "none": [empty, empty]}[boxes]
    losses = head.loss_by_feat(*head(features), truths, [{}, {}])
    assert all(loss.dim() == 0 and loss.isfinite() for loss in losses.values())
    assert losses["loss_cls"] > 0
    for name in ("loss_bbox", "loss_dfl"):
        assert (losses[name] > 0) == (boxes != "none")
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        # Under DDP every parameter must take part in every step.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # Scores are trained at every level, boxes where there is a positive.
        if not name.startswith(("reg_convs", "gfl_reg")):
            assert parameter.grad.abs().max() > 0, name


def test_an_empty_image_counts_as_one_positive():
    head = small()
    outputs = outputs_of(head, (64, 96))
    loss = head.loss_by_feat(*outputs, [truth_of([], [])] * 2, [{}, {}])["loss_cls"]
    p = torch.cat([x.flatten() for x in outputs[0]]).sigmoid()
    torch.testing.assert_close(loss, oracle.varifocal(p, torch.zeros(())).sum() / 2, rtol=1e-6, atol=0)


def test_scores_start_at_one_in_a_hundred():
    head = PicoHead(80, 96)
    head.init_weights()
    scores, boxes = head.eval()([torch.randn(1, 96, 320 // s, 320 // s) for s in STRIDES])
    assert all((x.sigmoid() - 0.01).abs().max() < 0.005 for x in scores)
    assert all((head.integral(x.permute(0, 2, 3, 1)) - 3.5).abs().max() < 0.2 for x in boxes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_640_has_room_for_the_areas_of_boxes(dtype):
    """A box of 600 x 600 pixels has 360,000 of them, and float16 ends at 65,504: losses and picks are float32's."""
    torch.manual_seed(0)
    head = small()
    head.init_weights()
    features = [torch.randn(1, 8, 640 // stride, 640 // stride) for stride in STRIDES]
    truths = [truth_of([[20, 20, 620, 620], [100, 300, 400, 630]], [0, 2], dtype=torch.float32)]
    found = []
    assign = head._assign
    head._assign = lambda *inputs: found.append(assign(*inputs)) or found[-1]
    with torch.autocast("cpu", dtype=dtype):
        outputs = head(features)
        losses = head.loss_by_feat(*outputs, truths, [{}])
    head.half() if dtype == torch.float16 else head.bfloat16()
    halved = head([x.to(dtype) for x in features])
    head.float()
    assert all(x.dtype == torch.float32 for maps in (*outputs, *halved) for x in maps)
    # The same maps in float32: what is left is the rounding of the expectations.
    expected = head.loss_by_feat(*outputs, truths, [{}])
    assert found[0].max() == 2 and torch.equal(found[0], found[1])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(stacked_convs=0), r"stacked_convs=0: expected at least 1"),
        (dict(kernel_size=4), r"kernel_size=4: expected an odd positive number"),
        (dict(reg_max=0), r"reg_max=0: expected at least 1 stride"),
        ({}, r"x: expected 4 maps, one for each of strides, got 3"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)([torch.randn(1, 8, 4, 4)] * 3)


def test_another_number_of_classes_starts_anew_and_keeps_the_rest(tmp_path):
    """What mmengine does with `load_from`: the convolutions that score start from their prior, towers are loaded."""
    trained, fresh = small(num_classes=80), small(num_classes=3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(7)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "trained.pth")
    fresh.init_weights()
    load_checkpoint(fresh, str(tmp_path / "trained.pth"), strict=False, logger="silent")
    for level in range(len(STRIDES)):
        scoring = fresh.gfl_cls[level]
        assert torch.sigmoid(scoring.bias[:3]).sub(0.01).abs().max() < 1e-6 and scoring.weight.abs().max() < 0.1
        for name, value in fresh.cls_convs[level].state_dict().items():
            assert torch.equal(value, trained.cls_convs[level].state_dict()[name])
