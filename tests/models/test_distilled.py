"""The detector with a teacher: its checkpoints are the student's, its losses as the formulas say."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from mmdet.models.detectors import SingleStageDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from castling_det.models.distilled import box_loss, feature_loss, score_loss
from tests.conversion.conftest import _TINY, randomised_state


def build(kind="castling_det.DistilledSingleStage", **distillation):
    init_default_scope("mmdet")
    model = Config(copy.deepcopy(_TINY)).model
    model.update(type=kind)
    if kind != "GFL":
        model.distillation = distillation
    return MODELS.build(model)


@pytest.fixture
def teacher_file(tmp_path):
    model = build("GFL")
    path = tmp_path / "teacher.pth"
    torch.save({"meta": {}, "state_dict": randomised_state(model, seed=5)}, path)
    return str(path)


def batch():
    truth = InstanceData(bboxes=torch.tensor([[8.0, 10.0, 40.0, 44.0]]), labels=torch.tensor([1]))
    sample = DetDataSample(gt_instances=truth, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)))
    sample.set_metainfo(dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (48, 64)))
    image = torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    return image, [sample]


def distilled(losses):
    return {name.rpartition("_")[2]: float(loss.detach()) for name, loss in losses.items() if "distill" in name}


def test_the_teacher_is_the_frozen_softmax_version_and_no_part_of_the_model(teacher_file):
    model, plain = build(checkpoint=teacher_file).train(), build("GFL")
    model.loss(*batch())
    assert list(model.state_dict()) == list(plain.state_dict())
    (teacher,) = model._teacher
    assert type(teacher) is SingleStageDetector and not teacher.training
    assert {block.attn.mode for block in teacher.backbone.blocks} == {"softmax"}
    assert {block.attn.mode for block in model.backbone.blocks} == {"castling"}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    saved = torch.load(teacher_file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())


def test_losses_vanish_for_a_student_that_is_the_teacher(teacher_file):
    saved = torch.load(teacher_file, weights_only=True)["state_dict"]
    model = build(checkpoint=teacher_file).eval()
    model.load_state_dict(saved)
    for block in model.backbone.blocks:
        block.attn.mode = "softmax"
    same = distilled(model.loss(*batch()))
    assert same.keys() == {"features", "scores", "boxes"} and max(same.values()) < 1e-9
    model.load_state_dict(randomised_state(model, seed=6))
    assert min(distilled(model.loss(*batch())).values()) > 1e-4


def test_weights_and_gradients(teacher_file):
    model = build(checkpoint=teacher_file, features=2.0, boxes=0.0).eval()
    state = randomised_state(model, seed=6)
    one = build(checkpoint=teacher_file).eval()
    for each in (model, one):
        each.load_state_dict(state)
    losses, ones = model.loss(*batch()), one.loss(*batch())
    assert distilled(losses).keys() == {"features", "scores"}
    assert distilled(losses)["features"] == pytest.approx(2 * distilled(ones)["features"])
    losses["loss_distill_features"].backward()
    assert model.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.bbox_head.gfl_cls.weight.grad is None


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        (dict(checkpoint="x", feature=1.0), r"expected checkpoint and weights >= 0 of features, scores, boxes"),
        (dict(checkpoint="x", boxes=-1.0), r"boxes.: -1.0}: expected checkpoint and weights >= 0"),
        (dict(), r"model.distillation.checkpoint: expected the file of a softmax training"),
        (dict(checkpoint="none.pth"), r"none.pth: no such file"),
    ],
)
def test_refusals(distillation, message):
    with pytest.raises(ValueError, match=message):
        build(**distillation).loss(*batch())


def test_another_detectors_checkpoint_is_refused(teacher_file):
    saved = torch.load(teacher_file, weights_only=True)
    saved["state_dict"].pop("bbox_head.gfl_cls.weight")
    torch.save(saved, teacher_file)
    with pytest.raises(ValueError, match=r"1 missing: bbox_head.gfl_cls.weight"):
        build(checkpoint=teacher_file).loss(*batch())


def levels(*channels, seed=0, sizes=((5, 7), (3, 4))):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, c, *size, generator=generator, dtype=torch.float64) for size in sizes] for c in channels]


def test_losses_against_loops():
    """Place by place, from the definitions; two images, two levels of odd sizes, three classes, five bins."""
    bins = 5
    scores, boxes = levels(3, 4 * bins, seed=1)
    teacher_scores, teacher_boxes = levels(3, 4 * bins, seed=2)
    objects = score_sum = box_sum = smooth_sum = 0.0
    for maps in zip(scores, teacher_scores, boxes, teacher_boxes, strict=True):
        for place in itertools.product(range(2), *map(range, maps[0].shape[2:])):
            own_s, other_s, own_b, other_b = (x.movedim(1, -1)[place] for x in maps)
            p, t = own_s.sigmoid(), other_s.sigmoid()
            entropy = -(t * p.log() + (1 - t) * (1 - p).log())
            score_sum += float((entropy * (p - t) ** 2).sum())
            objects += float(t.max())
            sides = zip(own_b.split(bins), other_b.split(bins), strict=True)
            divergence = [(b.softmax(0) * (b.softmax(0) / a.softmax(0)).log()).sum() for a, b in sides]
            box_sum += float(t.max() * sum(divergence) / 4)
            distance = (own_b - other_b).abs()
            smooth = torch.where(distance < 1, distance**2 / 2, distance - 0.5)
            smooth_sum += float(t.max() * smooth.mean())
    ratios = [((a - b) ** 2).mean() / (b**2).mean() for a, b in zip(scores, teacher_scores, strict=True)]
    for found, expected in (
        (score_loss(scores, teacher_scores), score_sum / objects),
        (box_loss(boxes, teacher_boxes, teacher_scores, bins=bins), box_sum / objects),
        (box_loss(boxes, teacher_boxes, teacher_scores), smooth_sum / objects),
        (feature_loss(scores, teacher_scores), float(sum(ratios)) / 2),
    ):
        assert float(found) == pytest.approx(expected, rel=1e-9)
