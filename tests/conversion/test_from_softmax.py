"""A softmax detector becomes the start of a castling training: same weights, and how far the start is from it."""

from __future__ import annotations

import json

import pytest
import torch

from castling_det.conversion import convert, load_checkpoint, start_from_softmax
from castling_det.conversion.detectors import build_detector, load_exactly, with_attention
from castling_det.conversion.from_softmax import set_first_mask
from tests.conversion.conftest import FAST, randomised_state, set_options

HOOK = dict(type="castling_det.MaskAnnealingHook", schedule="constant", share=0.99)


@pytest.fixture
def training(tiny_config):
    set_options(tiny_config, normalizer="kernel", threshold=0.0)
    tiny_config.custom_hooks = [dict(type="castling_det.ClassCountHook"), dict(HOOK)]
    return tiny_config


@pytest.fixture
def softmax_checkpoint(training, tmp_path):
    config = with_attention(training, "softmax")
    state = randomised_state(build_detector(config), seed=4)
    for name, value in state.items():
        if "qkv.weight" in name or "proj.weight" in name:
            value *= 10  # attention that is far from uniform
    path = tmp_path / "softmax.pth"
    meta = {"cfg": config.pretty_text, "iter": 10, "dataset_meta": {"classes": ("tree", "shrub")}}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {}}, path)
    return path, state


def features(model, image):
    with torch.inference_mode():
        return model.neck(model.backbone(image))


def test_the_start_is_the_softmax_detector(training, softmax_checkpoint, tmp_path):
    """A share of 1 - 1e-6 leaves a millionth of linear attention; elementwise, on an odd map."""
    source, state = softmax_checkpoint
    training.custom_hooks[-1]["share"] = 1 - 1e-6
    record = start_from_softmax(training, source, tmp_path / "start.pth", **FAST)
    assert "options of its attention" in record.notes[0] and len(record.notes) == 1
    saved = load_checkpoint(tmp_path / "start.pth")
    assert saved["state_dict"].keys() == state.keys()
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in state.items())
    castling, softmax, linear = (build_detector(with_attention(training, m)) for m in ("castling", "softmax", "linear"))
    for model in (castling, softmax, linear):
        load_exactly(model, saved["state_dict"], "start")
    set_first_mask(castling, training)
    image = torch.randn(2, 3, 40, 72, generator=torch.Generator().manual_seed(0))
    expected = features(softmax, image)
    for actual, wanted in zip(features(castling, image), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    # Negative control: without the softmax branch the same comparison fails by far.
    with pytest.raises(AssertionError):
        torch.testing.assert_close(features(linear, image), expected, rtol=0.01, atol=0.01)
    assert record.relative_drift < 1e-4 < max(drift.relative_rms for drift in record.drift_linear.values())


def test_the_record_says_what_was_done(training, softmax_checkpoint, tmp_path):
    source, _ = softmax_checkpoint
    record = start_from_softmax(training, source, tmp_path / "start.pth", command="start it", **FAST)
    written = json.loads((tmp_path / "start.json").read_text())
    assert written["command"] == "start it" and written["mask"]["threshold"] == 0.0
    assert written["mask"]["aux_scale"] == pytest.approx(99.0) and written["weights"]["dropped"].keys() == {"optimizer"}
    assert len(record.notes) == 1 and record.relative_drift < 0.05
    meta = load_checkpoint(tmp_path / "start.pth")["meta"]
    assert meta["castling_det"]["from_softmax"]["source_sha256"] == record.source.sha256
    assert "attention='castling'" in meta["cfg"] and "converted" not in meta["castling_det"]
    summary = record.summary()
    assert "threshold 0 absolute, factor 99" in summary and "RMS with linear attention alone" in summary


@pytest.mark.parametrize(
    ("backbone", "hook"),
    [(dict(normalizer="l2"), {}), (dict(threshold=0.02), {}), ({}, dict(share=0.5))],
    ids=["l2", "threshold", "share"],
)
def test_a_start_that_is_not_close_is_said(training, softmax_checkpoint, tmp_path, backbone, hook):
    set_options(training, **backbone)
    training.custom_hooks[-1].update(hook)
    record = start_from_softmax(training, softmax_checkpoint[0], tmp_path / "start.pth", **FAST)
    if record.relative_drift > 0.05:
        assert "away from the softmax detector; closest is normalizer='kernel'" in record.notes[1]
    else:
        assert len(record.notes) == 1
    set_options(training, normalizer="kernel", threshold=0.0)
    training.custom_hooks = [dict(HOOK)]
    closest = start_from_softmax(training, softmax_checkpoint[0], tmp_path / "closest.pth", **FAST)
    assert closest.relative_drift < record.relative_drift


def test_refusals(training, softmax_checkpoint, runner_checkpoint, tmp_path):
    source, _ = softmax_checkpoint
    out = tmp_path / "start.pth"
    cases = [
        (training, runner_checkpoint()[0], r"its meta says attention='castling': expected a detector trained"),
        (with_attention(training, "linear"), source, r"0 MaskAnnealingHooks in custom_hooks: expected one"),
        (with_attention(training, "softmax"), source, r"attention='softmax': only a detector"),
        (training, tmp_path / "none.pth", r"none.pth: no such file"),
    ]
    for config, path, message in cases:
        with pytest.raises(ValueError, match=message):
            start_from_softmax(config, path, out, **FAST)
    with pytest.raises(ValueError, match="is the source"):
        start_from_softmax(training, source, source, **FAST)
    training.model.backbone.embed_dims = 64
    with pytest.raises(ValueError, match="another architecture"):
        start_from_softmax(training, source, out, **FAST)
    assert not out.exists()


def test_a_distilled_training_is_converted_without_its_teacher(training, softmax_checkpoint, tmp_path):
    _, state = softmax_checkpoint
    training.model.update(type="castling_det.DistilledSingleStage", distillation=dict(checkpoint="teacher.pth"))
    mask = dict(threshold=float("inf"), threshold_unit="absolute", aux_scale=0.0)
    meta = {"cfg": training.pretty_text, "castling_det": {"mask": mask}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "trained.pth")
    manifest = convert(training, tmp_path / "trained.pth", tmp_path / "deploy.pth", **FAST)
    assert manifest.mask.empty_by == "aux_scale" and manifest.max_abs_drift == 0.0
    text = load_checkpoint(tmp_path / "deploy.pth")["meta"]["cfg"]
    assert "Distilled" not in text and "teacher.pth" not in text
    assert training.model.type == "castling_det.DistilledSingleStage", "the config given is not changed"
