"""Hybrid to linear-only: bit-identical once the mask is empty, refused otherwise, and a record of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from PIL import Image

from castling_det.conversion import convert, load_checkpoint, manifest_path
from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.files import sha256_of
from castling_det.layers import MaskState
from tests.conversion.conftest import EMPTY, FAST, NOT_EMPTY

pytestmark = pytest.mark.usefixtures("quick_macs")


def hybrid_with(config, tensors, mask=None):
    """The hybrid as training left it; with a mask, its softmax branch is on."""
    model = build_detector(with_attention(config, "castling"))
    model.load_state_dict(tensors)
    if mask:
        for block in model.backbone.blocks:
            block.attn.eval_aux = True
            block.attn.mask_state = MaskState.from_meta(mask)
    return model


@torch.inference_mode()
def detections(model, size=(64, 96)):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3)) * 4 - 2
    samples = [
        DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1, 1), batch_input_shape=size))
        for _ in range(2)
    ]
    found = model.predict(image, samples)
    return [(s.pred_instances.bboxes, s.pred_instances.scores, s.pred_instances.labels) for s in found]


@pytest.mark.parametrize("mask", [EMPTY, dict(EMPTY, threshold=1.0), dict(NOT_EMPTY, aux_scale=0.0)], ids=str)
@pytest.mark.parametrize("given", ["castling", "linear"])
def test_detections_are_bit_identical_once_the_mask_is_empty(tiny_config, runner_checkpoint, tmp_path, mask, given):
    source, checkpoint = runner_checkpoint(mask)
    out = tmp_path / "deploy" / "deploy.pth"
    manifest = convert(with_attention(tiny_config, given), source, out, **FAST)
    assert manifest.max_abs_drift == 0.0 and manifest.mask.empty_by
    deployed = init_detector(with_attention(tiny_config, "linear"), str(out), device="cpu")
    assert {block.attn.mode for block in deployed.backbone.blocks} == {"linear"}
    for hybrid in (
        hybrid_with(tiny_config, checkpoint["state_dict"]),
        hybrid_with(tiny_config, checkpoint["state_dict"], mask if mask["aux_scale"] else None),
    ):
        before, after = detections(hybrid), detections(deployed)
        assert sum(len(boxes) for boxes, *_ in before) > 0
        for expected, actual in zip(before, after, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_identity_check_sees_a_mask_that_is_not_empty(tiny_config, runner_checkpoint):
    _, checkpoint = runner_checkpoint(NOT_EMPTY)
    plain = detections(hybrid_with(tiny_config, checkpoint["state_dict"]))
    with_branch = detections(hybrid_with(tiny_config, checkpoint["state_dict"], NOT_EMPTY))
    assert not torch.equal(plain[0][1], with_branch[0][1])


def test_the_manifest_says_what_was_done(real_macs, tiny_config_file, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY, ema=True)
    out = tmp_path / "deploy.pth"
    convert(tiny_config_file, source, out, command="convert it", **FAST)
    record = json.loads(manifest_path(out).read_text())
    assert record["source"] == dict(path=str(source), sha256=sha256_of(source), bytes=source.stat().st_size)
    assert record["output"] == dict(path=str(out), sha256=sha256_of(out), bytes=out.stat().st_size)
    assert record["output"]["bytes"] < record["source"]["bytes"] - 400_000  # the optimizer's tensor alone
    assert record["config"] == str(tiny_config_file) and record["command"] == "convert it"
    assert (record["weights"]["kind"], record["weights"]["key"]) == ("ema", "state_dict")
    assert set(record["weights"]["dropped"]) == {
        "message_hub",
        "optimizer",
        "param_schedulers",
        "ema_state_dict",
    }
    assert (record["mask"]["threshold"], record["mask"]["empty_by"]) == ("inf", "threshold")
    assert record["mask"]["layers"] == {
        f"blocks.{index}": dict(kept_fraction=0.0, kept_mass=0.0, tokens=64) for index in range(2)
    }
    assert set(record["drift"]) == {"backbone.0", "backbone.1", "neck.0", "neck.1"}
    assert record["max_abs_drift"] == 0.0
    assert record["macs"]["shape"] == [64, 64]
    tokens, width, blocks = 64, 32, 2  # the softmax branch: q k^T and p v in every block
    assert record["macs"]["before"] - record["macs"]["after"] == blocks * 2 * tokens * tokens * width
    assert {"python", "torch", "mmengine", "mmcv", "mmdet", "castling_det"} <= set(record["versions"])


def test_meta_is_kept_and_training_state_is_not(tiny_config, runner_checkpoint, tmp_path):
    source, checkpoint = runner_checkpoint(EMPTY)
    checkpoint["meta"]["best"] = np.float64(0.25)
    torch.save(checkpoint, source)
    out = tmp_path / "deploy.pth"
    convert(tiny_config, source, out, **FAST)
    converted = torch.load(out, weights_only=True)  # needs no list of allowed names
    assert set(converted) == {"meta", "state_dict"}
    torch.testing.assert_close(dict(converted["state_dict"]), checkpoint["state_dict"], rtol=0, atol=0)
    meta = converted["meta"]
    assert meta["dataset_meta"] == checkpoint["meta"]["dataset_meta"]
    assert meta["iter"] == 10 and meta["best"] == 0.25
    own = meta["castling_det"]
    assert own["mask"] == EMPTY and own["training_cfg"] == checkpoint["meta"]["cfg"]
    assert own["converted"]["source_sha256"] == sha256_of(source)
    assert "attention='linear'" in meta["cfg"] and "attention='castling'" not in meta["cfg"]


@pytest.mark.parametrize(("weights", "key"), [("auto", "ema"), ("ema", "ema"), ("online", "online")])
def test_the_weights_that_are_asked_for_are_taken(tiny_config, runner_checkpoint, tmp_path, weights, key):
    source, checkpoint = runner_checkpoint(EMPTY, ema=True)
    out = tmp_path / "deploy.pth"
    assert convert(tiny_config, source, out, weights=weights, **FAST).weights.kind == key
    averaged = checkpoint["state_dict"]
    online = {name[7:]: value for name, value in checkpoint["ema_state_dict"].items() if name != "steps"}
    expected, other = (averaged, online) if key == "ema" else (online, averaged)
    converted = load_checkpoint(out)["state_dict"]
    name = "backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(converted[name], expected[name]) and not torch.equal(converted[name], other[name])


def test_a_mask_that_keeps_something_is_refused_unless_allowed(tiny_config, runner_checkpoint, tmp_path, photos):
    source, _ = runner_checkpoint(NOT_EMPTY)
    out = tmp_path / "deploy.pth"
    with pytest.raises(ValueError, match=r"mask is not empty.*blocks\.\d keeps.*% RMS.*--allow-nonempty-mask"):
        convert(tiny_config, source, out, probe_images=[photos], **FAST)
    assert not out.exists() and not manifest_path(out).exists()
    manifest = convert(tiny_config, source, out, probe_images=[photos], allow_nonempty_mask=True, **FAST)
    assert manifest.mask.empty_by is None and manifest.mask.kept_fraction == 1.0
    assert manifest.mask.layers["blocks.0"].kept_mass == pytest.approx(1.0)
    assert manifest.max_abs_drift > 1e-4 and all(0 < d.relative_rms < 10 for d in manifest.drift.values())
    assert any("--allow-nonempty-mask" in note for note in manifest.notes)
    assert "NO" in manifest.summary() and "drift neck.1" in manifest.summary()


def test_the_drift_is_that_of_the_feature_maps(tiny_config, runner_checkpoint, tmp_path, photos):
    source, checkpoint = runner_checkpoint(NOT_EMPTY)
    out = tmp_path / "deploy.pth"
    manifest = convert(tiny_config, source, out, probe_images=[photos / "0.png"], allow_nonempty_mask=True, **FAST)
    bgr = np.asarray(Image.open(photos / "0.png"))[..., ::-1].copy()
    image = (torch.from_numpy(bgr).permute(2, 0, 1)[None].float() - 118) / 58
    hybrid = hybrid_with(tiny_config, checkpoint["state_dict"], NOT_EMPTY)
    linear = init_detector(with_attention(tiny_config, "linear"), str(out), device="cpu")
    with torch.inference_mode():
        before, after = hybrid.backbone(image)[1], linear.backbone(image)[1]
    drift = manifest.drift["backbone.1"]
    assert drift.max_abs == pytest.approx(float((before - after).abs().max()), rel=1e-4)
    relative = float((before - after).square().mean().sqrt() / before.square().mean().sqrt())
    assert drift.relative_rms == pytest.approx(relative, rel=1e-4)
    assert manifest.probes.images == (str(photos / "0.png"),) and manifest.probes.shapes == ((64, 64),)


def test_noise_is_no_proof_and_real_images_are(tiny_config, runner_checkpoint, tmp_path, photos):
    mask = dict(NOT_EMPTY, threshold=0.999)  # nothing near it passes, but it is no certainty
    source, _ = runner_checkpoint(mask)
    out = tmp_path / "deploy.pth"
    with pytest.raises(ValueError, match=r"generated images is no proof.*--probe-images"):
        convert(tiny_config, source, out, **FAST)
    manifest = convert(tiny_config, source, out, probe_images=[photos], shape=(64, 64), num_probes=2)
    assert manifest.mask.empty_by == "probe images" and manifest.max_abs_drift == 0.0
    assert manifest.probes.kind == "files" and len(manifest.probes.images) == 2
    assert convert(tiny_config, source, out, allow_nonempty_mask=True, **FAST).mask.empty_by is None


@pytest.mark.parametrize(("threshold", "empty"), [(64.0, True), (63.0, False)])
def test_a_uniform_threshold_is_empty_from_the_number_of_tokens_on(
    tiny_config, runner_checkpoint, tmp_path, threshold, empty
):
    source, _ = runner_checkpoint(dict(NOT_EMPTY, threshold=threshold, threshold_unit="uniform"))
    manifest = convert(tiny_config, source, tmp_path / "d.pth", allow_nonempty_mask=True, **FAST)  # 8 x 8 tokens
    assert manifest.mask.empty_by == ("threshold" if empty else None)
    assert any("up to 64 tokens" in note for note in manifest.notes) == empty


def test_without_the_hooks_record_the_config_tells_the_threshold(tiny_config, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(mask=None)
    out = tmp_path / "deploy.pth"
    with pytest.raises(ValueError, match=r"threshold 0\.02|not empty"):
        convert(tiny_config, source, out, **FAST)
    tiny_config.model.backbone.threshold = 1.0
    manifest = convert(tiny_config, source, out, **FAST)
    assert manifest.mask.origin == "config" and manifest.mask.empty_by == "threshold"
    assert any("does not say where its mask stood" in note for note in manifest.notes)
