"""Initialisation of `CastlingLeViT` from timm's and the authors' files: the same features, a full report."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from castling_det.conversion import convert, load_pretrained
from castling_det.conversion.detectors import build_detector, with_attention
from castling_det.layers.levit_attention import resized_biases
from castling_det.models import CastlingLeViT, fuse_detector
from tests.compare import assert_parity
from tests.conversion.conftest import EMPTY, FAST
from tests.models.backbones import LEVIT as SMALL
from tests.models.backbones import image, randomised, small

ARCH, NAME = "128S", "levit_128s"


def reference(name=NAME):
    """timm's model with its two classifiers, every parameter and statistic random."""
    return randomised(timm.create_model(name, num_classes=5)).eval()


def softmax(**options):
    return CastlingLeViT(ARCH, attention="softmax", **options).eval()


def fused(model):
    fuse_detector(model)
    return model


def authors_state(state):
    """The names of facebookresearch/LeViT for timm's, with the indices that its files hold."""
    numbers, names = {}, {}
    for name, value in state.items():
        new = name.replace(".linear.weight", ".c.weight")
        if name.startswith("stem."):
            index = int(re.match(r"stem\.conv(\d)", name)[1])
            new = re.sub(r"^stem\.conv\d\.", f"patch_embed.{2 * index - 2}.", new)
        elif name.startswith("stages."):
            layer = r"stages\.\d\.(?:blocks\.\d|downsample)\.(?:attn_downsample|attn|mlp)"
            part, rest = re.match(rf"({layer})\.(.*)", new).groups()
            number = numbers.setdefault(part, len(numbers))
            inner = {"proj.ln.": "proj.1.", "q.ln.": "q.1.", "ln1.": "0.", "ln2.": "2."}
            for ours, theirs in inner.items():
                rest = theirs + rest[len(ours) :] if rest.startswith(ours) else rest
            residual = "" if part.endswith("attn_downsample") else "m."
            new = f"blocks.{number}.{residual}{rest}"
            if rest == "attention_biases":
                names[f"blocks.{number}.{residual}attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.long)
        else:
            new = name.replace(".linear.", ".l.")
        names[new] = value
    return names


@torch.inference_mode()
def assert_equal_features(model, backbone, name=""):
    x = image(224, 224, batch=1)
    expected = model.forward_intermediates(x, intermediates_only=True)
    for actual, wanted in zip(backbone(x)[1:], expected, strict=True):
        assert_parity(actual, wanted, rms=1e-5, maximum=1e-4, what=name)


@pytest.mark.parametrize("layout", ["timm", "authors", "convolutions", "a detector's"])
def test_features_equal_timms(layout, saved):
    model = reference("levit_conv_128s" if layout == "convolutions" else NAME)
    state, wrap = model.state_dict(), "model"
    if layout == "authors":
        state = authors_state(state)
        assert "blocks.4.kv.c.weight" in state and "blocks.4.q.1.c.weight" in state and "blocks.3.m.2.bn.bias" in state
        assert "blocks.2.m.proj.1.c.weight" in state and "patch_embed.6.c.weight" in state
    elif layout == "a detector's":
        state = {f"backbone.{name}": value for name, value in state.items()} | {"bbox_head.w": torch.zeros(1)}
        wrap = "state_dict"
    backbone = softmax()
    report = load_pretrained(backbone, saved(state, wrap=wrap))
    assert_equal_features(model, backbone, layout)
    assert report.vit_fraction == 1 and report.fraction > 0.99
    assert all(name.endswith(".dconv.weight") for name in report.new) and len(report.new) == 11
    expected = {"classification head"}
    expected |= {"indices, made anew for every size of map"} if layout == "authors" else set()
    expected |= {"not under 'backbone.'"} if layout == "a detector's" else set()
    assert set(report.dropped.values()) == expected
    assert bool(report.resized) == (layout == "convolutions")
    assert len(report.loaded) + len(report.new) == len(backbone.state_dict())


def test_softmax_to_castling(saved):
    model = reference()
    backbone = CastlingLeViT(ARCH, attention="castling")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    report = load_pretrained(backbone, saved(model.state_dict()))
    biases = {name for name in model.state_dict() if name.endswith("attention_biases")}
    assert len(biases) == 11
    assert all(report.dropped[name].startswith("position biases are N x N logits") for name in biases)
    for name, value in backbone.state_dict().items():
        expected = before if name in report.new else model.state_dict()
        assert torch.equal(value, expected[name]), name
    assert set(report.new) == {name for name in before if name.endswith("dconv.weight")}
    text = str(report)
    assert "stages.*.blocks.*.attn.dconv.weight (9)" in text
    assert "stages.1.downsample.attn_downsample.attention_biases: position biases" in text and "100.0%" in text


def test_biases_of_another_image_size(saved):
    model, backbone = reference(), softmax(img_size=320)
    report = load_pretrained(backbone, saved(model.state_dict()))
    name = "stages.1.downsample.attn_downsample.attention_biases"
    assert report.resized[name] == "14 x 14 to 20 x 20 distances, bilinear"
    assert torch.equal(backbone.state_dict()[name], resized_biases(model.state_dict()[name], (20, 20)))
    at_224 = softmax()
    load_pretrained(at_224, saved(model.state_dict()))
    x = image(320, 320, batch=1)
    with torch.inference_mode():
        for one, other in zip(backbone(x), at_224(x), strict=True):
            assert_parity(one, other, rms=1e-5, maximum=1e-4)


def test_fewer_stages_take_the_first_ones(saved):
    model, backbone = reference(), softmax(out_indices=(0, 2))
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert report.dropped["stages.2.downsample.mlp.ln1.bn.bias"] == "the model has no stages.2.downsample"
    assert report.dropped["stages.2.blocks.3.attn.attention_biases"] == "the model has no stages.2.blocks.3"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(),
            r"only 0.0%.*dropped  blocks\.0\.mlp\.fc1\.bias: no part of the backbone of LeViT",
        ),
        (lambda: small("levit").state_dict(), "shapes differ.*arch"),
        (lambda: fused(softmax()).state_dict(), "no place in the backbone.*norms are not fused"),
        (lambda: {k: v for k, v in reference().state_dict().items() if "stem" not in k}, r"only 98\..*new      stem"),
    ],
    ids=["a ViT", "narrower", "fused", "no stem"],
)
def test_another_network_is_refused(other, message, assert_refused):
    assert_refused(softmax(), other(), message, min_fraction=0.99)


def test_a_detector_with_an_empty_mask_converts(tiny_config, tmp_path):
    tiny_config.model.backbone = dict(type="castling_det.CastlingLeViT", arch=SMALL, out_indices=(0, 1))
    tiny_config.model.neck.in_channels = [8, 16]
    hybrid = build_detector(tiny_config)
    randomised(hybrid.backbone)
    meta = {"cfg": tiny_config.pretty_text, "castling_det": {"mask": EMPTY}}
    source = tmp_path / "source.pth"
    torch.save({"meta": meta, "state_dict": hybrid.state_dict()}, source)
    manifest = convert(tiny_config, source, tmp_path / "deploy.pth", **FAST)
    assert manifest.max_abs_drift == 0 and set(manifest.mask.layers) == {"stages.0.blocks.0", "stages.0.blocks.1"}
    assert manifest.mask.layers["stages.0.blocks.0"].tokens == 16
    linear = build_detector(with_attention(tiny_config, "linear"))
    linear.load_state_dict(torch.load(tmp_path / "deploy.pth", weights_only=True)["state_dict"], strict=True)
