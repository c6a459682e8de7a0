"""The recipe of PicoDet in the base configs: multi-scale batches, the size of the evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.logging import MessageHub

BASES = Path(__file__).resolve().parents[2] / "configs" / "_base_"
MODEL = BASES / "models" / "picodet_csppan_pico-head.py"


def test_every_batch_gets_a_square_of_its_own():
    """The training pipeline, then the data preprocessor: sizes of the recipe, boxes scaled with their image."""
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
            loaded = dict(
                img=generator.integers(256, size=(*hw, 3), dtype=np.uint8),
                img_shape=hw,
                ori_shape=hw,
                gt_bboxes=HorizontalBoxes(torch.tensor([[5.0, 6, 60, 65], [20, 10, 50, 80]])),
                gt_bboxes_labels=np.array([1, 2]),
                gt_ignore_flags=np.array([False, False]),
            )
            for key, value in transform(loaded).items():
                batch[key].append(value)
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
    resize = Compose(Config.fromfile(BASES / "datasets" / "coco_picodet.py").test_pipeline[1:2])
    assert resize(dict(img=np.zeros((70, 90, 3), np.uint8)))["img"].shape == (320, 320, 3)
