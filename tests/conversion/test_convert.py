"""Hybrid to linear-only: bit-identical once the mask is empty, refused otherwise, and a record of it."""

from __future__ import annotations

import errno
import json
import math
import resource

import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from PIL import Image
from safetensors.torch import save

from castling_det.conversion import convert, load_checkpoint, manifest_path, start_from_softmax
from castling_det.conversion.detectors import build_detector, own_meta, with_attention
from castling_det.export.onnx import load_deployable
from castling_det.files import sha256_of
from castling_det.layers import MaskState, attention_layers
from castling_det.runtime.torch_detector import TorchDetector
from tests.conversion.conftest import EMPTY, FAST, NOT_EMPTY, set_options

BIAS = "neck.fpn_convs.1.conv.bias"


def hybrid_with(config, tensors, mask=None):
    """The hybrid as training left it; with a mask, its softmax branch is on."""
    model = build_detector(with_attention(config, "castling"))
    model.load_state_dict(tensors)
    for layer in attention_layers(model).values() if mask else ():
        layer.eval_aux, layer.mask_state = True, MaskState(mask["threshold"])
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
    assert manifest.max_abs_drift == 0.0 and manifest.mask.empty_by and manifest.notes == ()
    deployed = init_detector(with_attention(tiny_config, "linear"), str(out), device="cpu")
    assert {layer.mode for layer in attention_layers(deployed).values()} == {"linear"}
    after = detections(deployed)
    for shown in (None, mask if mask["aux_scale"] else None):
        before = detections(hybrid_with(tiny_config, checkpoint["state_dict"], shown))
        assert sum(len(boxes) for boxes, *_ in before) > 0
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_the_identity_check_sees_a_mask_that_is_not_empty(tiny_config, runner_checkpoint):
    _, checkpoint = runner_checkpoint(NOT_EMPTY)
    plain = detections(hybrid_with(tiny_config, checkpoint["state_dict"]))
    with_branch = detections(hybrid_with(tiny_config, checkpoint["state_dict"], NOT_EMPTY))
    assert not torch.equal(plain[0][1], with_branch[0][1])


def test_the_manifest_says_what_was_done(tiny_config_file, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY, ema=True)
    out = tmp_path / "deploy.pth"
    convert(tiny_config_file, source, out, command="convert it", **FAST)
    record = json.loads(manifest_path(out).read_text())
    assert record["source"] == dict(path=str(source), sha256=sha256_of(source), bytes=source.stat().st_size)
    assert record["output"] == dict(path=str(out), sha256=sha256_of(out), bytes=out.stat().st_size)
    assert record["output"]["bytes"] < record["source"]["bytes"] - 400_000  # the optimizer's tensor alone
    assert record["config"] == str(tiny_config_file) and record["command"] == "convert it"
    assert (record["weights"]["kind"], record["weights"]["key"]) == ("ema", "state_dict")
    assert set(record["weights"]["dropped"]) == {"message_hub", "optimizer", "param_schedulers", "ema_state_dict"}
    assert (record["mask"]["threshold"], record["mask"]["empty_by"]) == ("inf", "threshold")
    assert record["mask"]["layers"] == {
        f"blocks.{index}": dict(kept_fraction=0.0, kept_mass=0.0, tokens=64) for index in range(2)
    }
    assert set(record["drift"]) == {"backbone.0", "backbone.1", "neck.0", "neck.1"}
    assert record["max_abs_drift"] == 0.0
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
    assert own["attention"]["blocks.1"]["mode"] == "linear" and own["attention"]["blocks.1"]["num_heads"] == 2
    assert "attention='linear'" in meta["cfg"] and "attention='castling'" not in meta["cfg"]


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


def test_noise_and_images_that_do_not_differ_are_no_proof_and_real_images_are(
    tiny_config, runner_checkpoint, tmp_path, photos
):
    source, _ = runner_checkpoint(dict(NOT_EMPTY, threshold=0.999))  # nothing near it passes, but it is no certainty
    out, black = tmp_path / "deploy.pth", tmp_path / "black"
    black.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 40)).save(black / f"{index}.png")  # which is padded
    with pytest.raises(ValueError, match=r"generated images is no proof.*--probe-images"):
        convert(tiny_config, source, out, **FAST)
    for images, different in (([black], 0), ([photos / "0.png"] * 3, 1), ([black, photos / "0.png"], 1)):
        with pytest.raises(ValueError, match=rf"probe images {different} differ and have more than one colour"):
            convert(tiny_config, source, out, probe_images=images)
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
    set_options(tiny_config, threshold=1.0)
    manifest = convert(tiny_config, source, out, **FAST)
    assert manifest.mask.origin == "config" and manifest.mask.empty_by == "threshold"
    assert any("does not say where its mask stood" in note for note in manifest.notes)
    assert any("does not state the options of its attention" in note for note in manifest.notes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(normalizer="kernel"), "normalizer='l2', but the config has normalizer='kernel'"),
        (dict(center_keys=True), "center_keys=False, but the config has center_keys=True"),
        (dict(num_heads=4), "num_heads=2, but the config has num_heads=4"),
    ],
)
def test_a_config_whose_attention_computes_something_else_is_refused(
    tiny_config, runner_checkpoint, tmp_path, changed, message
):
    """The parameters fit, the mask is empty and the drift is 0: only the record tells."""
    source, checkpoint = runner_checkpoint(EMPTY)
    set_options(tiny_config, **changed)
    with pytest.raises(
        ValueError, match=rf"source\.pth: its attention blocks\.0 was trained with {message}; set model"
    ):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)
    del checkpoint["meta"]["castling_det"]["attention"]
    torch.save(checkpoint, source)
    manifest = convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)
    assert manifest.max_abs_drift == 0.0 and "does not state the options" in manifest.notes[0]


@pytest.mark.parametrize("weights", ["auto", "online"])
def test_the_weights_that_are_asked_for_are_taken(tiny_config, runner_checkpoint, tmp_path, weights):
    source, checkpoint = runner_checkpoint(EMPTY, ema=True)
    convert(tiny_config, source, tmp_path / "deploy.pth", weights=weights, **FAST)
    both = {"auto": checkpoint["state_dict"][BIAS], "online": checkpoint["ema_state_dict"][f"module.{BIAS}"]}
    assert not torch.equal(*both.values())
    assert torch.equal(load_checkpoint(tmp_path / "deploy.pth")["state_dict"][BIAS], both[weights])


def test_safetensors_hold_the_same_and_are_read_alike(tiny_config_file, tiny_config, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY)
    for suffix in ("pth", "safetensors"):
        convert(tiny_config_file, source, tmp_path / f"deploy.{suffix}", **FAST)
    plain, safe = (load_checkpoint(tmp_path / f"deploy.{suffix}") for suffix in ("pth", "safetensors"))
    assert plain["state_dict"].keys() == safe["state_dict"].keys()
    assert all(torch.equal(value, safe["state_dict"][name]) for name, value in plain["state_dict"].items())
    for meta in (plain["meta"], safe["meta"]):
        del meta["castling_det"]["converted"]["created"]
    assert json.loads(json.dumps(plain["meta"], default=str)) == safe["meta"]
    out = tmp_path / "deploy.safetensors"
    assert load_deployable(tiny_config_file, out)[2:] == load_deployable(tiny_config_file, tmp_path / "deploy.pth")[2:]
    with pytest.raises(ValueError, match="is converted already"):
        convert(tiny_config_file, out, tmp_path / "again.pth", **FAST)
    with pytest.raises(ValueError, match=r"expected a \.pth file, which MMEngine loads"):
        start_from_softmax(tiny_config_file, source, out)
    set_options(tiny_config, normalizer="kernel")
    with pytest.raises(ValueError, match=r"deploy\.safetensors: its attention blocks\.0 was trained with"):
        load_deployable(tiny_config, out)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "null"])
def test_a_header_that_lies_about_its_meta_is_one_line(tmp_path, text):
    path = tmp_path / "deploy.safetensors"
    path.write_bytes(save({"w": torch.zeros(1)}, {"castling_det.meta": text}))
    if text == "null":
        assert own_meta(load_checkpoint(path), path) == ({}, {})
    else:
        with pytest.raises(ValueError, match=r"deploy\.safetensors: no whole safetensors file"):
            load_checkpoint(path)


def test_every_reader_of_a_checkpoint_compares_its_attention(
    tiny_config_file, tiny_config, runner_checkpoint, tmp_path
):
    source, checkpoint = runner_checkpoint(EMPTY)
    out, other = tmp_path / "deploy.pth", tmp_path / "other.py"
    convert(tiny_config_file, source, out, **FAST)
    set_options(tiny_config, normalizer="kernel")
    tiny_config.dump(other)
    message = r"deploy\.pth: its attention blocks\.0 was trained with normalizer='l2'"
    for read in (load_deployable, lambda config, path: TorchDetector(path, config)):
        with pytest.raises(ValueError, match=message):
            read(other, out)
    assert load_deployable(tiny_config_file, out)[-1] == ()
    torch.save(checkpoint["state_dict"], out)  # weights alone say nothing of mask and options
    assert "does not say how it was trained" in load_deployable(tiny_config_file, out)[-1][0]
    with pytest.raises(ValueError, match="trained with attention='castling' and is not converted"):
        load_deployable(tiny_config_file, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(other=s.pop(BIAS)), r"1 missing: neck\.fpn_convs\.1\.conv\.bias; 1 unexpected: other"),
        (lambda s: s.pop(BIAS), r"1 missing: neck\.fpn_convs\.1\.conv\.bias"),
        (lambda s: s.update({BIAS: torch.zeros(80)}), r"1 of another shape: .*conv\.bias \(80,\) for \(16,\)"),
        (lambda s: s[BIAS][3:4].fill_(math.nan), r"not finite in 1 tensors.*neck\.fpn_convs\.1\.conv\.bias"),
    ],
)
def test_another_architecture_is_refused_by_name(tiny_config, runner_checkpoint, tmp_path, change, message):
    source, checkpoint = runner_checkpoint(EMPTY)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, source)
    with pytest.raises(ValueError, match=message):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


@pytest.mark.parametrize("mode", ["softmax", "linear"])
def test_only_hybrids_are_converted(tiny_config, runner_checkpoint, tmp_path, mode):
    source, checkpoint = runner_checkpoint(EMPTY)
    checkpoint["meta"]["cfg"] = checkpoint["meta"]["cfg"].replace("'castling'", f"'{mode}'")
    torch.save(checkpoint, source)
    with pytest.raises(ValueError, match=f"its meta says attention='{mode}'"):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (dict(EMPTY, threshold="0.5"), r"\['mask'\]: threshold='0.5'"),
        (dict(EMPTY, threshold=math.nan), r"threshold=nan"),
        (dict(EMPTY, threshold_unit="percent"), r"threshold_unit='percent'"),
        (dict(EMPTY, aux_scale=-2), r"aux_scale=-2"),
        ([EMPTY], r"meta\['castling_det'\] is no record"),
    ],
)
def test_a_broken_mask_record_is_refused(tiny_config, runner_checkpoint, tmp_path, mask, message):
    source, _ = runner_checkpoint(mask)
    with pytest.raises(ValueError, match=message):
        convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)


def test_paths_and_options_are_checked(tiny_config, runner_checkpoint, tmp_path, photos):
    source, _ = runner_checkpoint(EMPTY)
    out = tmp_path / "deploy.pth"
    for arguments, options, message in [
        ((tiny_config, source, tmp_path / "deploy.json"), {}, r"expected a \.pth or \.safetensors file"),
        ((tiny_config, source, source), {}, "is the source"),
        ((tiny_config, source, out), dict(weights="ema"), "no average"),
        ((tiny_config, source, out), dict(weights="best"), "weights='best'"),
        ((tiny_config, source, out), dict(num_probes=0), "num_probes=0"),
        ((tiny_config, source, out), dict(shape=(0, 64)), r"shape=\(0, 64\)"),
        ((tiny_config, source, out), dict(probe_images=[tmp_path / "none"]), "no such file or folder"),
        ((tiny_config, source, out), dict(probe_images=[photos / "notes.txt"]), "notes.txt: cannot be read"),
        ((tmp_path / "none.py", source, out), {}, r"none\.py: no such file"),
        ((with_attention(tiny_config, "softmax"), source, out), {}, "attention='softmax': only a detector"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(*arguments, **{**FAST, **options})
    assert not out.exists()


def test_a_full_disk_leaves_the_old_files(tiny_config, runner_checkpoint, tmp_path):
    source, _ = runner_checkpoint(EMPTY)
    out = tmp_path / "deploy" / "deploy.pth"
    convert(tiny_config, source, out, **FAST)
    old = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the file system stops the write half-way
    try:
        with pytest.raises(OSError) as caught:
            convert(tiny_config, source, out, command="again", **FAST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and "deploy.pth: cannot be written" in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == old
