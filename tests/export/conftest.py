"""Detectors of every family, small enough to trace in seconds, with random parameters that find something."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from torch import nn

from castling_det.conversion.detectors import build_detector

PREPROCESSOR = dict(
    type="DetDataPreprocessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_size_divisor=32,
)
DENSE_TEST = dict(nms_pre=60, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.6), max_per_img=30)
VIT = dict(
    type="castling_det.CastlingViT", embed_dims=16, depth=1, num_heads=2, patch_size=8, img_size=64, attention="linear"
)
LEVIT = dict(
    type="castling_det.CastlingLeViT",
    arch=dict(embed_dims=(32, 48), num_heads=(2, 3), depths=(1, 1), key_dim=8),
    out_indices=(0, 1, 2),
    attention="linear",
)
MVIT = dict(
    type="castling_det.CastlingMViT",
    arch=dict(depths=(1, 1, 1), embed_dims=16),
    out_indices=(0, 1, 2),
    attention="linear",
)
HEAD = dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)
GFL_HEAD = dict(
    type="GFLHead",
    **HEAD,
    norm_cfg=dict(type="GN", num_groups=4),
    anchor_generator=dict(
        type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16]
    ),
    loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True),
    loss_dfl=dict(type="DistributionFocalLoss"),
    loss_bbox=dict(type="GIoULoss"),
    reg_max=8,
)
PYRAMID = dict(type="castling_det.SimpleFeaturePyramid", in_channels=16, in_stride=8, out_channels=16)
DELTAS = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.5] * 4)


def extractor(size):
    """RoI features of `size` x `size`."""
    layer = dict(type="RoIAlign", output_size=size, sampling_ratio=0)
    return dict(type="SingleRoIExtractor", roi_layer=layer, out_channels=16, featmap_strides=[4, 8, 16, 32])


MODELS = {
    "gfl_vit": dict(type="GFL", backbone=VIT, neck=dict(PYRAMID, out_strides=(8, 16)), bbox_head=GFL_HEAD),
    "picodet_levit": dict(
        type="GFL",
        backbone=LEVIT,
        neck=dict(type="castling_det.CSPPAN", in_channels=(16, 32, 48), out_channels=16),
        bbox_head=dict(type="castling_det.PicoHead", **HEAD),
    ),
    "rtmdet_levit": dict(
        type="RTMDet",
        backbone=LEVIT,
        neck=dict(type="castling_det.CSPPAN", in_channels=(16, 32, 48), out_channels=16, num_outs=3),
        bbox_head=dict(
            type="RTMDetSepBNHead",
            **HEAD,
            share_conv=True,
            exp_on_reg=True,
            norm_cfg=dict(type="BN"),
            anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16, 32]),
            bbox_coder=dict(type="DistancePointBBoxCoder"),
            loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True),
            loss_bbox=dict(type="GIoULoss"),
        ),
    ),
    "gfl_mvit": dict(
        type="GFL",
        backbone=MVIT,
        neck=dict(type="FPN", in_channels=[16, 32, 64], out_channels=16, num_outs=3),
        bbox_head=dict(GFL_HEAD, anchor_generator=dict(GFL_HEAD["anchor_generator"], strides=[4, 8, 16])),
    ),
    # Its coarsest stride is more than the padding: a map of one row must not be what is traced.
    "retinanet_vit": dict(
        type="RetinaNet",
        backbone=VIT,
        neck=dict(PYRAMID, out_strides=(8, 16, 32, 64, 128)),
        bbox_head=dict(
            type="RetinaHead",
            **HEAD,
            anchor_generator=dict(
                type="AnchorGenerator", octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 2.0],
                strides=[8, 16, 32, 64, 128],
            ),
            bbox_coder=DELTAS,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True),
            loss_bbox=dict(type="L1Loss"),
        ),
    ),
    "mask_rcnn_vit": dict(
        type="MaskRCNN",
        backbone=VIT,
        neck=dict(PYRAMID, out_strides=(4, 8, 16, 32)),
        rpn_head=dict(
            type="RPNHead",
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0], strides=[4, 8, 16, 32]),
            bbox_coder=DELTAS,
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True),
            loss_bbox=dict(type="L1Loss"),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(extractor(7), finest_scale=14),
            bbox_head=dict(
                type="Shared2FCBBoxHead",
                in_channels=16,
                fc_out_channels=16,
                roi_feat_size=7,
                num_classes=3,
                bbox_coder=DELTAS,
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False),
                loss_bbox=dict(type="L1Loss"),
            ),
            mask_roi_extractor=extractor(14),
            mask_head=dict(type="FCNMaskHead", num_convs=1, in_channels=16, conv_out_channels=16, num_classes=3),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=60, max_per_img=40, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
            rcnn=dict(
                score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=30, mask_thr_binary=0.5
            ),
        ),
    ),
}  # fmt: skip
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs"),
]


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Layers this small only lose by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(family):
    """The config of a small detector."""
    model = copy.deepcopy(MODELS[family])
    model["data_preprocessor"] = PREPROCESSOR
    model.setdefault("test_cfg", DENSE_TEST)
    if model["type"] == "MaskRCNN":
        model["train_cfg"] = None
    dataset = dict(type="CocoDataset", metainfo=dict(classes=("tree", "shrub", "rock")), pipeline=PIPELINE)
    return Config(dict(default_scope="mmdet", model=model, test_dataloader=dict(dataset=dataset)))


def randomised(model, seed=0):
    """Every parameter and every statistic random, in sizes that keep the maps near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            fan = max(1, value[0].numel()) if value.dim() > 1 else 16
            value.copy_(torch.randn(value.shape, generator=generator) / fan**0.5)
            if name.endswith("norm.weight") or ("bn" in name and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator) / 4)
                norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.fixture
def tiny():
    """`tiny(family)` gives config and detector."""

    def make(family):
        config = tiny_config(family)
        return config, randomised(build_detector(config))

    return make


@pytest.fixture
def deployable(tiny, tmp_path):
    """`deployable(family)` gives a config and the checkpoint file of a linear training."""

    def make(family, **meta):
        config, detector = tiny(family)
        path = tmp_path / f"{family}.pth"
        torch.save({"meta": {"cfg": config.pretty_text, **meta}, "state_dict": detector.state_dict()}, path)
        return config, path

    return make
