"""Folding BatchNorm and layer scale: the same maps with random statistics, shared convolutions, refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.registry import init_default_scope
from timm.layers import LayerScale
from torch import nn

from castling_det.models import fuse_detector
from castling_det.registry import MODELS
from tests.compare import assert_parity
from tests.models.backbones import LEVIT, randomised

BN = dict(type="BN")
PREPROCESSOR = dict(type="DetDataPreprocessor", mean=[118.0] * 3, std=[58.0] * 3, pad_size_divisor=32)


def levit():
    return dict(
        type="GFL",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(
            type="castling_det.CastlingLeViT",
            arch=LEVIT,
            out_indices=(0, 1, 2),
            attention="linear",
        ),
        neck=dict(type="castling_det.CSPPAN", in_channels=(8, 16, 24), out_channels=16, num_outs=4),
        bbox_head=dict(
            type="castling_det.PicoHead", num_classes=2, in_channels=16, feat_channels=16, strides=(8, 16, 32, 64)
        ),
        test_cfg=dict(nms_pre=50, score_thr=0.02, nms=dict(type="nms", iou_threshold=0.6), max_per_img=20),
    )


def vit():
    return dict(
        type="RTMDet",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(
            type="castling_det.CastlingViT",
            embed_dims=32,
            depth=2,
            num_heads=2,
            patch_size=8,
            img_size=64,
            stem="conv",
            init_values=0.3,
            attention="linear",
        ),
        neck=dict(
            type="castling_det.SimpleFeaturePyramid", in_channels=32, in_stride=8, out_channels=16, out_strides=(8, 16)
        ),
        # The levels of this head share their convolutions, and each has norms of its own.
        bbox_head=dict(
            type="RTMDetSepBNHead",
            num_classes=2,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            share_conv=True,
            exp_on_reg=False,
            norm_cfg=BN,
            anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16]),
            bbox_coder=dict(type="DistancePointBBoxCoder"),
            loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True),
            loss_bbox=dict(type="GIoULoss"),
        ),
        test_cfg=dict(nms_pre=50, score_thr=0.02, nms=dict(type="nms", iou_threshold=0.6), max_per_img=20),
    )


def built(config):
    """A detector in eval mode: zero biases or unit variances would hide a fault."""
    init_default_scope("mmdet")
    return randomised(MODELS.build(config())).eval()


@torch.inference_mode()
def assert_same_maps(fused, model):
    image = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    features = [detector.extract_feat(image) for detector in (fused, model)]
    outputs = [[y for group in d.bbox_head(x) for y in group] for d, x in zip((fused, model), features, strict=True)]
    for pair in [*zip(*features, strict=True), *zip(*outputs, strict=True)]:
        assert_parity(*pair, rms=1e-5, maximum=1e-4)


@pytest.mark.parametrize("config", [levit, vit])
def test_a_fused_detector_computes_the_same(config):
    model = built(config)
    fused = copy.deepcopy(model)
    fuse_detector(fused)
    kinds = {type(part) for part in fused.modules()}
    assert not kinds & {nn.BatchNorm1d, nn.BatchNorm2d, LayerScale}
    assert_same_maps(fused, model)
    # What is folded already stays as it is.
    state = copy.deepcopy(fused.state_dict())
    fuse_detector(fused)
    torch.testing.assert_close(fused.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("config", [levit, vit])
def test_a_wrong_statistic_is_seen(config):
    """Negative control of the test above."""
    model = built(config)
    fused = copy.deepcopy(model)
    next(part for part in fused.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))).running_var.mul_(1.1)
    fuse_detector(fused)
    with pytest.raises(AssertionError):
        assert_same_maps(fused, model)


def test_a_norm_in_training_mode_is_refused_and_nothing_is_folded():
    model = built(vit)
    model.bbox_head.train()
    with pytest.raises(ValueError, match=r"bbox_head\..* is in training mode"):
        fuse_detector(model)
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.backbone.modules())


def test_a_convolution_with_a_bias_keeps_it():
    layer = randomised(ConvModule(4, 6, 3, padding=1, bias=True, norm_cfg=BN, act_cfg=None)).eval()
    image = torch.randn(1, 4, 7, 5)
    expected = layer(image)
    fuse_detector(layer)
    assert_parity(layer(image), expected, rms=1e-6, maximum=1e-5)
