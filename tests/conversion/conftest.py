"""A detector small enough to convert in a second, and checkpoints of it."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from safetensors.torch import save_file

from castling_det.conversion import load_pretrained
from castling_det.conversion.detectors import build_detector
from castling_det.engine.mask_annealing import attention_record
from castling_det.layers import attention_layers

NOT_EMPTY = dict(schedule="geometric", threshold=0.0, threshold_unit="absolute", aux_scale=1.0, empty=False)
EMPTY = dict(NOT_EMPTY, threshold=float("inf"), empty=True)

FAST = dict(shape=(64, 64), num_probes=1)

_TINY = dict(
    default_scope="mmdet",
    model=dict(
        type="GFL",
        data_preprocessor=dict(type="DetDataPreprocessor", mean=[118.0] * 3, std=[58.0] * 3, pad_size_divisor=16),
        backbone=dict(
            type="castling_det.CastlingViT",
            embed_dims=32,
            depth=2,
            num_heads=2,
            patch_size=8,
            img_size=64,
            attention="castling",
            out_indices=(0, 1),
        ),
        neck=dict(type="FPN", in_channels=[32, 32], out_channels=16, num_outs=2),
        bbox_head=dict(
            type="GFLHead",
            num_classes=2,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            norm_cfg=dict(type="GN", num_groups=4),
            anchor_generator=dict(
                type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16]
            ),
            loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
            loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
            reg_max=8,
            loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        ),
        train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(
            nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.6), max_per_img=20
        ),
    ),
    test_dataloader=dict(
        dataset=dict(
            type="CocoDataset",
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="Resize", scale=(64, 64), keep_ratio=True),
                dict(type="LoadAnnotations", with_bbox=True),
                dict(type="PackDetInputs", meta_keys=("img_id", "img_shape", "scale_factor")),
            ],
        )
    ),
)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Layers this small only lose by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config():
    """A GFL detector with two castling blocks on 64 x 64 pixels; each test gets its own copy."""
    return Config(copy.deepcopy(_TINY))


@pytest.fixture
def tiny_config_file(tiny_config, tmp_path):
    """The same in a file."""
    path = tmp_path / "tiny_castling.py"
    tiny_config.dump(path)
    return path


def set_options(config, num_heads=None, **options):
    """Gives the backbone of a config these options of the attention."""
    backbone = config.model.backbone
    backbone.attn_cfg = {**(backbone.get("attn_cfg") or {}), **options}
    if num_heads is not None:
        backbone.num_heads = num_heads


def randomised_state(model, seed=0):
    """Every parameter and statistic random, so that nothing dropped can hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith("integral.project"):  # the head's table 0, 1, 2, ...
            noise = torch.randn(value.shape, generator=generator) * 0.1
            state[name] = noise.abs() + 0.5 if "norm" in name and name.endswith("weight") else noise
    return state


@pytest.fixture(scope="session")
def trained():
    """Config text, record of the attention, averaged and online weights of the tiny detector; not to be changed."""
    config = Config(copy.deepcopy(_TINY))
    model = build_detector(config)
    attention = attention_record(attention_layers(model))
    return config.pretty_text, attention, randomised_state(model, seed=1), randomised_state(model, seed=2)


@pytest.fixture
def runner_checkpoint(trained, tmp_path):
    """Writes what a Runner saves: `save(mask, ema=False)` gives the path and the content."""

    def save(mask=EMPTY, ema=False):
        text, attention, averaged, online = copy.deepcopy(trained)
        checkpoint = {
            "meta": {
                "cfg": text,
                "iter": 10,
                "dataset_meta": {"classes": ("tree", "shrub"), "palette": [(0, 1, 2), (3, 4, 5)]},
            },
            "state_dict": averaged,
            "message_hub": {},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(100_000)}}, "param_groups": []},
            "param_schedulers": [{"last_step": 10}],
        }
        if mask is not None:
            checkpoint["meta"]["castling_det"] = {"mask": mask, "attention": attention}
        if ema:
            checkpoint["ema_state_dict"] = {"steps": torch.tensor(10)} | {
                f"module.{key}": value for key, value in online.items()
            }
        path = tmp_path / "source.pth"
        torch.save(checkpoint, path)
        return path, checkpoint

    return save


@pytest.fixture
def saved(tmp_path):
    """`saved(state, name="weights.pth", wrap=None)` gives the file of a state dict."""

    def save(state, name="weights.pth", wrap=None):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in state.items()}, path)
        else:
            torch.save({wrap: state} if wrap else state, path)
        return path

    return save


@pytest.fixture
def assert_refused(saved):
    """`assert_refused(backbone, state, message)`: the file is refused, and the backbone is as it was."""

    def check(backbone, state, message, **options):
        before = {name: value.clone() for name, value in backbone.state_dict().items()}
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            load_pretrained(backbone, saved(state), **options)
        torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)

    return check


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(pixels.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder
