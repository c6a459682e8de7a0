"""Folding BatchNorm and layer scale: the same maps with random statistics, shared convolutions, strict loading."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.registry import init_default_scope
from torch import nn

from castling_det.models import FusedDetector, fuse_detector
from castling_det.registry import MODELS
from tests.compare import assert_parity

BN = dict(type="BN")
PREPROCESSOR = dict(type="DetDataPreprocessor", mean=[118.0] * 3, std=[58.0] * 3, pad_size_divisor=32)


def randomised(model, seed=0):
    """Every parameter and every statistic random: a zero bias or a unit variance would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) * 3 + 0.2)
                norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    return model.eval()


def levit():
    return dict(
        type="GFL",
        data_preprocessor=PREPROCESSOR,
        backbone=dict(
            type="castling_det.CastlingLeViT",
            arch=dict(embed_dims=(32, 48), num_heads=(2, 3), depths=(1, 1), key_dim=8),
            out_indices=(0, 1, 2),
            attention="linear",
        ),
        neck=dict(type="castling_det.CSPPAN", in_channels=(16, 32, 48), out_channels=16, num_outs=4),
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


def maps(model, image):
    with torch.inference_mode():
        features = model.extract_feat(image)
        return [*features, *(level for group in model.bbox_head(features) for level in group)]


def built(config):
    init_default_scope("mmdet")
    return MODELS.build(copy.deepcopy(config))


@pytest.mark.parametrize("config", [levit, vit])
def test_a_fused_detector_computes_the_same(config):
    model = randomised(built(config()))
    fused = copy.deepcopy(model)
    counts = fuse_detector(fused)
    assert sum(counts.values()) >= 7
    assert not [part for part in fused.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    image = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    for expected, actual in zip(maps(model, image), maps(fused, image), strict=True):
        assert_parity(actual, expected, rms=1e-5, maximum=1e-4)


@pytest.mark.parametrize("config", [levit, vit])
def test_a_wrong_statistic_is_seen(config):
    """Negative control of the test above."""
    model = randomised(built(config()))
    fused = copy.deepcopy(model)
    norm = next(part for part in fused.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    norm.running_var.mul_(1.01)
    fuse_detector(fused)
    image = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError):
        for expected, actual in zip(maps(model, image), maps(fused, image), strict=True):
            assert_parity(actual, expected, rms=1e-5, maximum=1e-4)


@pytest.mark.parametrize("config", [levit, vit])
def test_a_fused_state_dict_loads_strictly_into_the_fused_config(config):
    model = randomised(built(config()))
    fuse_detector(model)
    target = built(dict(config(), type="castling_det.FusedDetector", detector=config()["type"]))
    target.load_state_dict(model.state_dict(), strict=True)
    assert type(target) is type(model)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    for expected, actual in zip(maps(model, image), maps(target, image), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fusing_twice_changes_nothing_more():
    model = randomised(built(vit()))
    fuse_detector(model)
    assert fuse_detector(model) == {}


def test_a_norm_in_training_mode_is_refused_and_nothing_is_folded():
    model = randomised(built(vit()))
    model.bbox_head.train()
    with pytest.raises(ValueError, match=r"bbox_head\..* is in training mode"):
        fuse_detector(model)
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.backbone.modules())


def test_a_convolution_with_a_bias_keeps_it():
    layer = randomised(ConvModule(4, 6, 3, padding=1, bias=True, norm_cfg=BN, act_cfg=None))
    image = torch.randn(1, 4, 7, 5)
    expected = layer(image)
    fuse_detector(layer)
    assert_parity(layer(image), expected, rms=1e-6, maximum=1e-5)


def test_the_registry_builds_the_same_function():
    assert MODELS.get("castling_det.FusedDetector") is FusedDetector
