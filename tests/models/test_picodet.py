"""The recipe of PicoDet in the base configs: multi-scale batches, the size of the evaluation, the schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS, init_default_scope
from torch import nn

BASES = Path(__file__).resolve().parents[2] / "configs" / "_base_"
MODEL = BASES / "models" / "picodet_csppan_pico-head.py"


def test_every_batch_gets_a_square_of_its_own():
    """The training pipeline, then the data preprocessor: sizes of the recipe, boxes scaled with their image."""
    init_default_scope("mmdet")
    pipeline = Config.fromfile(BASES / "datasets" / "coco_picodet.py").train_pipeline
    assert [step.type for step in pipeline[:2]] == ["LoadImageFromFile", "LoadAnnotations"]
    transform = Compose(pipeline[2:])
    generator = np.random.default_rng(0)
    preprocessor = MODELS.build(Config.fromfile(MODEL).model.data_preprocessor)
    sides = set()
    for iteration in range(12):
        MessageHub.get_current_instance().update_info("iter", iteration)
        batch = {"inputs": [], "data_samples": []}
        for hw in ((120, 200), (90, 70)):
            sample = transform(
                dict(
                    img=generator.integers(256, size=(*hw, 3), dtype=np.uint8),
                    img_shape=hw,
                    ori_shape=hw,
                    gt_bboxes=HorizontalBoxes(torch.tensor([[5.0, 6, 60, 65], [20, 10, 50, 80]])),
                    gt_bboxes_labels=np.array([1, 2]),
                    gt_ignore_flags=np.array([False, False]),
                )
            )
            batch["inputs"].append(sample["inputs"])
            batch["data_samples"].append(sample["data_samples"])
        assert all(image.shape == (3, 384, 384) for image in batch["inputs"])
        before = [sample.gt_instances.bboxes.tensor.clone() / 384 for sample in batch["data_samples"]]
        data = preprocessor(batch, training=True)
        height, width = data["inputs"].shape[-2:]
        assert height == width and height % 32 == 0 and 256 <= height <= 384
        sides.add(height)
        for boxes, sample in zip(before, data["data_samples"], strict=True):
            assert sample.img_shape == sample.batch_input_shape == (height, width)
            torch.testing.assert_close(sample.gt_instances.bboxes / height, boxes)
    assert len(sides) > 2


def test_the_evaluation_size_is_fixed():
    init_default_scope("mmdet")
    resize = Compose(Config.fromfile(BASES / "datasets" / "coco_picodet.py").test_pipeline[1:2])
    assert resize(dict(img=np.zeros((70, 90, 3), np.uint8)))["img"].shape == (320, 320, 3)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = Config.fromfile(BASES / "schedules" / "picodet_300e.py")
    init_default_scope("mmdet")
    settings = config.optim_wrapper.optimizer
    optimizer = OPTIMIZERS.build(dict(**settings, params=[nn.Parameter(torch.zeros(1))]))
    assert optimizer.defaults["momentum"] == 0.9 and optimizer.defaults["weight_decay"] == 4e-5
    warmup, cosine = (dict(scheduler) for scheduler in config.param_scheduler)
    epoch_length = 50
    cosine.pop("convert_to_iter_based")
    cosine_class = PARAM_SCHEDULERS.get(cosine.pop("type"))
    schedulers = [
        PARAM_SCHEDULERS.build(dict(**warmup, optimizer=optimizer)),
        cosine_class.build_iter_from_epoch(optimizer=optimizer, epoch_length=epoch_length, **cosine),
    ]
    rates = []
    for _ in range(config.max_epochs * epoch_length):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(0.04) and max(rates) == pytest.approx(0.4, rel=0.01)
    assert rates.index(max(rates)) == pytest.approx(config.warmup_iters, abs=2)
    assert rates[len(rates) // 2] == pytest.approx(0.2, rel=0.01) and rates[-1] < 1e-6
