"""Every config: loads, builds, trains a step, predicts; the four files of a model; the metafile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*/*.py"))
NAMES = [config.stem for config in CONFIGS]


def build(config):
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model


def generated_batch(sizes, num_classes):
    generator = torch.Generator().manual_seed(0)
    batch = {"inputs": [], "data_samples": []}
    for size in sizes:
        corners = torch.rand(5, 2, generator=generator) * 50
        truth = InstanceData(
            bboxes=torch.cat([corners, corners + 10 + torch.rand(5, 2, generator=generator) * 30], dim=1),
            labels=torch.randint(num_classes, (5,), generator=generator),
        )
        sample = DetDataSample(gt_instances=truth, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)))
        sample.set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        batch["inputs"].append(torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8))
        batch["data_samples"].append(sample)
    return batch


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_trains_a_step_and_predicts(path):
    config = Config.fromfile(path)
    model = build(config).train()
    batch = generated_batch([(96, 128), (128, 100)], config.model.bbox_head.num_classes)
    data = model.data_preprocessor(batch, training=True)
    losses = model.loss(data["inputs"], data["data_samples"])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    # Under DDP every parameter must take part in every step.
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []
    with torch.no_grad():
        results = model.eval().predict(data["inputs"], data["data_samples"])
    assert len(results) == 2 and all(result.pred_instances.scores.isfinite().all() for result in results)


def test_four_files_a_model():
    families = {}
    for name in NAMES:
        (attention,) = [word for word in ("softmax", "linear", "castling", "deploy") if f"_{word}_" in name]
        families.setdefault(name.replace(f"_{attention}_", "_ATTENTION_"), set()).add(attention)
    assert len(families) == 2
    assert all(files == {"softmax", "linear", "castling", "deploy"} for files in families.values())


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_the_four_differ_in_the_attention_alone(path):
    """Against the softmax config: the backbone's attention and mask, and the hooks, nothing else."""
    (attention,) = [word for word in ("softmax", "linear", "castling", "deploy") if f"_{word}_" in path.stem]
    config = Config.fromfile(path).to_dict()
    baseline = Config.fromfile(path.with_name(path.name.replace(f"_{attention}_", "_softmax_"))).to_dict()
    for settings in (config, baseline):
        backbone = settings["model"]["backbone"]
        found = backbone.pop("attention")
        backbone.pop("threshold", None), backbone.pop("threshold_unit", None)
        settings.pop("custom_hooks")
    assert found == "softmax"
    assert config == baseline


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_no_config_downloads_weights(path):
    config = Config.fromfile(path)
    assert config.model.backbone.get("init_cfg") is None and config.load_from is None
    assert "http" not in str(config.model)


def test_castling_ramps_end_at_the_number_of_tokens():
    for path in CONFIGS:
        if "_castling_" in path.stem:
            config = Config.fromfile(path)
            (hook,) = [hook for hook in config.custom_hooks if hook.type == "castling_det.MaskAnnealingHook"]
            height, width = (side // config.model.backbone.patch_size for side in config.image_size)
            assert hook.end == height * width


def test_the_metafile_lists_every_config():
    listed = []
    for metafile in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]:
        listed += [model["Config"] for model in yaml.safe_load((ROOT / metafile).read_text())["Models"]]
    assert sorted(listed) == [str(config.relative_to(ROOT)) for config in CONFIGS]
