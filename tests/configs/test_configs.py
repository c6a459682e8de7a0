"""Every config: loads, builds; trains a step, predicts, converts; the four files of a model; the metafiles."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import site
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from castling_det.conversion import convert, load_checkpoint
from castling_det.layers import MaskedAttention
from castling_det.models.levit import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[!_]*/*.py"))
NAMES = [config.stem for config in CONFIGS]
# Others go on from a trained detector of a family, or train in another way, instead of comparing attentions.
FAMILIES = [config for config in CONFIGS if not re.search("-from-softmax|-progressive", config.stem)]
BASELINES = [config for config in CONFIGS if "_softmax" in config.stem]
CASTLING = [config for config in CONFIGS if "_castling_" in config.stem]
# One model of each detector on each backbone.
CONVERTED = list({config.stem.split("vit-")[0]: config for config in CASTLING}.values())
# One size of each model that is trained; `test_parts_fit_at_full_size` builds all sizes and attentions.
HYBRIDS = [config for config in CONFIGS if not re.search("_(linear|deploy)", config.stem)]
TRAINED = list({re.sub("vit-[^_]+", "vit", config.stem): config for config in HYBRIDS}.values())
ATTENTIONS = ("softmax", "linear", "castling", "deploy")
WINDOWS = "softmax-window"
"""A second softmax baseline beside the four, where the published detector has windows."""


@pytest.fixture(scope="module", autouse=True)
def quick_bases():
    """mmengine reads every metafile of MMDetection for each `mmdet::` base, seconds at a time; here once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_utils, "load", functools.cache(config_utils.load))
        yield


read = functools.cache(Config.fromfile)


def load(path):
    return copy.deepcopy(read(path))


def shrunk(config):
    """Fewer blocks, proposals and queries, for the sake of time; widths, levels, heads and losses are the config's."""
    model = config.model
    backbone = model.backbone
    if backbone.type == "castling_det.CastlingViT":
        backbone.depth = 2
        if "global_indices" in backbone:
            backbone.global_indices = (1,)
    elif backbone.type == "castling_det.CastlingMViT":
        backbone.arch = dict(depths=(1, 1, 1, 1))
    else:
        backbone.arch = ARCHITECTURES[backbone.arch]._replace(depths=(1, 1, 1))._asdict()
    if "roi_head" in model:
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 10
        model.train_cfg.rcnn.sampler.num = 8
        # An untrained head is sure of nothing.
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
    if "num_queries" in model:
        model.num_queries = 20
        model.encoder.num_layers = model.decoder.num_layers = 2
    return config


def build(config):
    init_default_scope("mmdet")
    torch.manual_seed(0)
    # DINO writes into the config that it is built from.
    model = MODELS.build(copy.deepcopy(config.model))
    model.init_weights()
    return model


def generated_batch(sizes, model):
    """Images with five boxes each, and their masks where the model wants some."""
    num_classes = (model.roi_head if "roi_head" in model else model).bbox_head.num_classes
    generator = torch.Generator().manual_seed(0)
    batch = {"inputs": [], "data_samples": []}
    for size in sizes:
        corners = torch.rand(5, 2, generator=generator) * 50
        truth = InstanceData(
            bboxes=torch.cat([corners, corners + 10 + torch.rand(5, 2, generator=generator) * 30], dim=1),
            labels=torch.randint(num_classes, (5,), generator=generator),
        )
        if "roi_head" in model:
            masks = np.zeros((5, *size), dtype=np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, truth.bboxes.int().tolist(), strict=True):
                mask[top:bottom, left:right] = 1
            truth.masks = BitmapMasks(masks, *size)
        sample = DetDataSample(gt_instances=truth, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)))
        sample.set_metainfo({"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        batch["inputs"].append(torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8))
        batch["data_samples"].append(sample)
    return batch


@torch.no_grad()
def detections(model, data):
    results = model.eval().predict(data["inputs"], copy.deepcopy(data["data_samples"]))
    return [result.pred_instances for result in results]


@pytest.mark.parametrize("path", TRAINED, ids=[path.stem for path in TRAINED])
def test_trains_a_step_and_predicts(path, tmp_path):
    config = shrunk(load(path))
    if "distillation" in config.model:
        config.model.distillation.checkpoint = str(tmp_path / "teacher.pth")
    model = build(config).train()
    if "distillation" in config.model:
        torch.save({"meta": {}, "state_dict": model.state_dict()}, tmp_path / "teacher.pth")
    batch = generated_batch([(96, 128), (128, 100)], config.model)
    # As the runner does: BatchSyncRandomResize draws a size every so many iterations.
    MessageHub.get_current_instance().update_info("iter", 0)
    data = model.data_preprocessor(batch, training=True)
    losses = model.loss(data["inputs"], data["data_samples"])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    # Under DDP every parameter must take part in every step.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    found = detections(model, data)
    assert len(found) == 2 and all(instances.scores.isfinite().all() for instances in found)
    if "roi_head" in config.model:
        assert all(instances.masks.shape[0] == len(instances) > 0 for instances in found)


@pytest.mark.parametrize("path", CONVERTED, ids=[path.stem for path in CONVERTED])
def test_converts_and_predicts_the_same(path, tmp_path):
    """The converted file loads into the deploy config, which detects what the hybrid does without its branch."""
    config = shrunk(load(path))
    hybrid = build(config)
    empty = dict(schedule="geometric", threshold=float("inf"), threshold_unit="uniform", aux_scale=1.0, empty=True)
    meta = {"cfg": "attention='castling'", "castling_det": {"mask": empty}}
    torch.save({"meta": meta, "state_dict": hybrid.state_dict()}, tmp_path / "hybrid.pth")
    trained = Config(dict(default_scope="mmdet", model=config.model))
    manifest = convert(trained, tmp_path / "hybrid.pth", tmp_path / "deploy.pth", shape=(128, 128), num_probes=1)
    assert manifest.max_abs_drift == 0.0
    deployed = build(shrunk(load(path.with_name(path.name.replace("_castling_", "_deploy_")))))
    deployed.load_state_dict(load_checkpoint(tmp_path / "deploy.pth")["state_dict"], strict=True)
    data = hybrid.data_preprocessor(generated_batch([(96, 128)], config.model), training=False)
    (before,), (after,) = detections(hybrid, data), detections(deployed, data)
    torch.testing.assert_close(after.bboxes, before.bboxes, rtol=0, atol=0)
    torch.testing.assert_close(after.scores, before.scores, rtol=0, atol=0)


@contextlib.contextmanager
def without_memory():
    """On the meta device, for which there is no autocast."""
    init_default_scope("mmdet")
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("castling_det.ops.linear_angular.without_autocast", lambda tensor: contextlib.nullcontext())
        yield


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_parts_fit_at_full_size(path):
    """The whole model, without memory: the neck takes the backbone's channels, the head's strides are the neck's."""
    model = load(path).model
    with without_memory():
        detector = MODELS.build(copy.deepcopy(model)).eval()
        maps = detector.backbone(torch.empty(1, 3, 512, 512))
        levels = detector.neck(maps)
        if model.type != "DINO":
            (detector.rpn_head if "rpn_head" in model else detector.bbox_head)(levels)
    backbone = detector.backbone
    taken = model.neck.in_channels
    assert ([taken] if isinstance(taken, int) else list(taken)) == list(backbone.out_channels)
    assert [feature.shape[1] for feature in maps] == list(backbone.out_channels)
    strides = [512 // level.shape[-1] for level in levels]
    head = model.get("rpn_head", model.bbox_head if "bbox_head" in model else None)
    if model.type == "DINO":
        assert len(strides) == model.decoder.layer_cfg.cross_attn_cfg.num_levels
    else:
        assert strides == list(head.strides if "strides" in head else head.anchor_generator.strides)
    if "roi_head" in model:
        assert strides[:-1] == list(model.roi_head.bbox_roi_extractor.featmap_strides)


@pytest.mark.parametrize("path", FAMILIES, ids=[path.stem for path in FAMILIES])
def test_the_four_differ_in_the_attention_alone(path):
    """Against the softmax config: the backbone's attention, mask and windows, and the hooks, nothing else."""
    (attention,) = [word for word in (*ATTENTIONS, WINDOWS) if f"_{word}_" in path.stem]
    assert all(path.with_name(path.name.replace(f"_{attention}_", f"_{other}_")).is_file() for other in ATTENTIONS)
    config = load(path).to_dict()
    baseline = load(path.with_name(path.name.replace(f"_{attention}_", "_softmax_"))).to_dict()
    for settings in (config, baseline):
        backbone = settings["model"]["backbone"]
        found = backbone.pop("attention")
        options = backbone.pop("attn_cfg", {})
        backbone["attn_cfg"] = {key: value for key, value in options.items() if "threshold" not in key}
        for option in ("window_size", "global_indices"):
            backbone.pop(option, None)
        if attention == WINDOWS:
            backbone["attn_cfg"].pop("local_conv", None)
        settings.pop("custom_hooks")
    assert found == "softmax"
    assert config == baseline


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_imports_the_package_downloads_nothing_and_counts_the_classes(path):
    config = load(path)
    assert config.custom_imports == dict(imports=["castling_det"], allow_failed_imports=False)
    assert config.model.backbone.get("init_cfg") is None and config.load_from is None
    assert "http" not in str(config.to_dict())
    hooks = [hook.type for hook in config.custom_hooks]
    assert hooks.count("castling_det.ClassCountHook") == ("_deploy" not in path.stem)


def test_a_clone_on_the_path_works_without_an_installation():
    """`-S` reads no .pth file: nothing of ours is there until the config imports it, stand-in operators included."""
    config = ROOT / "configs" / "castling_vit" / "gfl_castling-vit-nano_castling_tree-crowns.py"
    code = f"""
import sys
assert not [finder for finder in sys.meta_path if hasattr(finder, "castling_det_hook")]
from mmengine.config import Config
config = Config.fromfile({str(config)!r})
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
init_default_scope("mmdet")
print(type(MODELS.build(config.model).backbone))
"""
    path = os.pathsep.join([str(ROOT), *site.getsitepackages()])
    command, environment = [sys.executable, "-S", "-c", code], {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert "castling_det.models.vit.CastlingViT" in run.stdout, run.stderr


@pytest.mark.parametrize("path", CASTLING, ids=[path.stem for path in CASTLING])
def test_castling_ramps_end_empty(path, monkeypatch):
    """At the number of tokens of the largest training image where it is given, else by each layer's own."""
    config = load(path)
    counted = []
    monkeypatch.setattr(MaskedAttention, "_masked_branch", lambda *_, num_keys: counted.append(num_keys))
    with without_memory():
        MODELS.build(config.model.backbone)(torch.empty(1, 3, *config.image_size))
    (hook,) = [hook for hook in config.custom_hooks if hook.type == "castling_det.MaskAnnealingHook"]
    assert hook.get("end", max(counted)) == max(counted) > 1
    assert ("end" in hook) == (not path.stem.endswith("_coco"))


@pytest.mark.parametrize("path", [c for c in CONFIGS if re.search(r"_\d+xb\d", c.stem)], ids=lambda path: path.stem)
def test_the_rate_belongs_to_the_batch_in_the_name(path):
    gpus, images = map(int, re.search(r"_(\d+)xb(\d+)-", path.stem).groups())
    assert load(path).auto_scale_lr.base_batch_size == gpus * images == gpus * load(path).train_dataloader.batch_size


def test_the_metafile_lists_every_config():
    listed = []
    for metafile in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]:
        listed += [model["Config"] for model in yaml.safe_load((ROOT / metafile).read_text())["Models"]]
    assert sorted(listed) == [str(config.relative_to(ROOT)) for config in CONFIGS]
