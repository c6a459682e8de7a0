"""PicoDet of the base configs: a step of training, its sizes, multi-scale batches, the schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from castling_det.report.complexity import detector_complexity
from tests.models.test_csp_pan import neck_params
from tests.models.test_pico_head import head_params

BASES = Path(__file__).resolve().parents[2] / "configs" / "_base_"
MODEL = BASES / "models" / "picodet_csppan_pico-head.py"


@MODELS.register_module(force=True)
class ThreeMaps(BaseModule):
    """Strides 8, 16, 32 by convolutions without overlap."""

    def __init__(self, widths):
        super().__init__()
        inputs = (3, *widths)
        self.layers = nn.ModuleList(
            nn.Conv2d(inputs[i], width, side, side)
            for i, (width, side) in enumerate(zip(widths, (8, 2, 2), strict=True))
        )

    def forward(self, x):
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return tuple(outputs)


def base_config():
    config = Config.fromfile(MODEL)
    config.model.backbone = dict(type="ThreeMaps", widths=(16, 24, 32))
    config.model.neck.in_channels = (16, 24, 32)
    return config


def built_detector(config):
    init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = MODELS.build(config.model)
    detector.init_weights()
    return detector


def batch_of(sizes, dtype=torch.uint8):
    inputs, samples = [], []
    for size in sizes:
        truth = InstanceData(
            bboxes=torch.tensor([[10.0, 20, 60, 80], [30, 30, 100, 120]]), labels=torch.tensor([3, 79])
        )
        sample = DetDataSample(gt_instances=truth, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)))
        sample.set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        inputs.append(torch.randint(256, (3, *size)).to(dtype))
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def test_the_base_config_trains_a_step_and_predicts():
    config = base_config()
    config.model.data_preprocessor.batch_augments = None
    detector = built_detector(config).train()
    data = detector.data_preprocessor(batch_of([(128, 160), (160, 128)]), training=True)
    total, _ = detector.parse_losses(detector.loss(data["inputs"], data["data_samples"]))
    total.backward()
    assert total.isfinite()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    # Scores start below the threshold of the tests.
    detector.eval().bbox_head.test_cfg.score_thr = 0.0
    with torch.no_grad():
        results = detector.predict(data["inputs"], data["data_samples"])
    assert [len(result.pred_instances) for result in results] == [100, 100]
    assert all(result.pred_instances.bboxes.isfinite().all() for result in results)


def test_the_base_config_is_picodet_s():
    detector = built_detector(base_config())
    assert sum(p.numel() for p in detector.neck.parameters()) == neck_params((16, 24, 32), 96)
    assert sum(p.numel() for p in detector.bbox_head.parameters()) == head_params(96, 2)


def test_multiply_adds_of_the_detector():
    """At 128 x 160 the maps have 320, 80, 20 and 2 x 3 cells."""
    cells = (16 * 20, 8 * 10, 4 * 5, 2 * 3)
    width, half, outputs = 96, 48, 112
    tower = 2 * (25 * width + width * width) + width * outputs
    mixer = 2 * 2 * width * half + half * half + (25 * half + half * half) + width * width
    down = 25 * width + width * width
    neck = sum(hw * c * width for hw, c in zip(cells, (16, 24, 32), strict=False))
    neck += mixer * (cells[0] + 2 * cells[1] + cells[2]) + down * (cells[1] + cells[2] + 2 * cells[3])
    found = detector_complexity(base_config(), (128, 160))
    assert found.macs_by_part["neck"] == neck
    assert found.macs_by_part["bbox_head"] == tower * sum(cells)


def test_every_batch_gets_a_square_of_its_own():
    """The training pipeline, then the data preprocessor: sizes of the recipe, boxes scaled with their image."""
    init_default_scope("mmdet")
    pipeline = Config.fromfile(BASES / "datasets" / "coco_picodet.py").train_pipeline
    assert [step.type for step in pipeline[:2]] == ["LoadImageFromFile", "LoadAnnotations"]
    transform = Compose(pipeline[2:])
    generator = np.random.default_rng(0)
    preprocessor = MODELS.build(base_config().model.data_preprocessor)
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
