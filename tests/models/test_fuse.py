"""Folding BatchNorm and layer scale: the same outputs with random statistics, shared convolutions, refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RTMDetSepBNHead
from timm.layers import LayerScale
from torch import nn

from castling_det.models import CSPPAN, fuse_detector
from tests.compare import assert_parity
from tests.models.backbones import image, randomised, small

BN = dict(type="BN")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def shared_head():
    """Its two levels share their convolutions, and each has norms of its own."""
    return RTMDetSepBNHead(
        num_classes=2,
        in_channels=6,
        feat_channels=6,
        share_conv=True,
        exp_on_reg=False,
        norm_cfg=BN,
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16]),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True),
        loss_bbox=dict(type="GIoULoss"),
    )


PARTS = {
    "levit, softmax": (lambda: small("levit", "softmax"), image(96, 160)),
    "levit, linear": (lambda: small("levit", "linear"), image(96, 160)),
    "vit": (lambda: small("vit-conv", "linear"), image(96, 160)),
    "neck": (lambda: CSPPAN((3, 3), out_channels=8, num_outs=3), [image(8, 12), image(4, 6)]),
    "head": (shared_head, [torch.cat([image(8, 12)] * 2, dim=1), torch.cat([image(4, 6)] * 2, dim=1)]),
    "bias": (lambda: ConvModule(3, 6, 3, bias=True, norm_cfg=BN, act_cfg=None), image(9, 7)),
}


def flat(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else [x for output in outputs for x in flat(output)]


@torch.inference_mode()
def assert_same(fused, model, x):
    for pair in zip(flat(fused(x)), flat(model(x)), strict=True):
        assert_parity(*pair, rms=1e-5, maximum=1e-4)


@pytest.mark.parametrize("name", PARTS)
def test_a_fused_part_computes_the_same(name):
    build, x = PARTS[name]
    model = randomised(build()).eval()
    fused, wrong = copy.deepcopy(model), copy.deepcopy(model)
    fuse_detector(fused)
    assert not any(isinstance(part, (*NORMS, LayerScale)) for part in fused.modules())
    assert_same(fused, model, x)
    fuse_detector(fused)
    assert_same(fused, model, x)
    next(part for part in wrong.modules() if isinstance(part, NORMS)).running_var.mul_(1.1)
    fuse_detector(wrong)
    with pytest.raises(AssertionError):
        assert_same(wrong, model, x)


def test_a_norm_in_training_mode_is_refused_and_nothing_is_folded():
    model = small("levit").eval()
    model.stages[1].train()
    with pytest.raises(ValueError, match=r"stages\.1\..* is in training mode"):
        fuse_detector(model)
    assert isinstance(model.stem.conv1.bn, nn.BatchNorm2d)
