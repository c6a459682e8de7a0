"""MViTv2 files of timm, its authors and mmpretrain into `CastlingMViT`: the same features as timm's, a full report."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg, checkpoint_filter_fn

from castling_det.conversion import load_pretrained
from castling_det.conversion.pretrained import _mvit_names
from castling_det.models import CastlingMViT
from tests.compare import assert_parity, errors
from tests.layers.test_attention import randomised

ARCH = dict(depths=(1, 2, 3, 1), embed_dims=8)


@pytest.fixture(scope="module")
def model():
    """timm's MViTv2 of a small width, every parameter random."""
    cfg = MultiScaleVitCfg(depths=ARCH["depths"], embed_dim=ARCH["embed_dims"])
    return randomised(MultiScaleVit(cfg, img_size=(64, 64), num_classes=5)).eval()


def ours(attention="softmax", **options):
    return CastlingMViT(**{"arch": ARCH, "attention": attention, "img_size": 64, **options}).eval()


def authors(state):
    """The authors' names: blocks numbered through, a block's own `proj`, another head."""
    depths, numbered = ARCH["depths"], {}
    for name, value in state.items():
        if found := re.match(r"stages\.(\d)\.blocks\.(\d)\.(.*)", name):
            number = sum(depths[: int(found[1])]) + int(found[2])
            name = f"blocks.{number}.{found[3].replace('shortcut_proj_attn', 'proj')}"
        numbered[name.replace("head.fc", "head.projection")] = value
    return numbered


def mmpretrains(state):
    """mmpretrain's: the authors' but for the patch embedding and the norms, under a classifier's `backbone.`."""
    named = {}
    for name, value in authors(state).items():
        name = re.sub(r"^norm\.", "norm3.", name.replace("patch_embed.proj", "patch_embed.projection"))
        named[name.replace("head.projection", "head.fc") if name.startswith("head") else f"backbone.{name}"] = value
    return named


@torch.inference_mode()
def last_maps(model, backbone, size=(64, 64)):
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    actual = backbone(image)[-1]
    return actual, model.forward_features(image).transpose(1, 2).reshape(actual.shape)


@pytest.mark.parametrize(("layout", "wrap"), [(dict, None), (authors, "model_state"), (mmpretrains, "state_dict")])
def test_features_equal_timms(layout, wrap, model, saved):
    backbone = ours()
    report = load_pretrained(backbone, saved(layout(model.state_dict()), wrap=wrap))
    assert_parity(*last_maps(model, backbone), rms=1e-5, maximum=1e-4)
    assert report.vit_fraction == 1 and report.fraction > 0.95
    assert {re.sub(r"\d", "*", name) for name in report.new} == {
        "stages.*.blocks.*.attn.dconv.weight", "norm*.weight", "norm*.bias"
    }  # fmt: skip
    assert not any(name.startswith("norm3") for name in report.new)
    assert len(report.dropped) == 2 and all(name.startswith("head") for name in report.dropped)
    assert not report.resized


def test_the_parity_check_sees_a_wrong_load(model, saved):
    backbone = ours()
    load_pretrained(backbone, saved(model.state_dict()))
    good = errors(*last_maps(model, backbone))[0]
    blocks = backbone.stages[2]["blocks"]
    blocks[1], blocks[2] = blocks[2], blocks[1]  # as if the blocks were counted wrongly
    assert errors(*last_maps(model, backbone))[0] > max(100 * good, 1e-4)


def test_softmax_weights_into_the_hybrid(model, saved):
    backbone = ours("castling")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    report = load_pretrained(backbone, saved(model.state_dict()))
    state, source = backbone.state_dict(), model.state_dict()
    tables = [name for name in source if "rel_pos" in name]
    assert len(tables) == 2 * sum(ARCH["depths"])
    assert all(report.dropped[name].startswith("relative positions are N x N logits") for name in tables)
    for name in source.keys() - set(tables):
        if not name.startswith(("head", "norm")):
            assert torch.equal(state[name], source[name]), name
    assert torch.equal(state["norm3.weight"], source["norm.weight"])
    assert report.new and all(torch.equal(state[name], before[name]) for name in report.new)
    assert set(report.loaded) | set(report.new) == set(state) and report.vit_fraction == 1
    text = str(report)
    assert "stages.*.blocks.*.attn.dconv.weight (7)" in text and "norm0.weight" in text and "rel_pos_h" in text


@pytest.mark.parametrize("img_size", [96, 32])
def test_relative_positions_are_resized_as_timm_does(img_size, model, saved):
    cfg = MultiScaleVitCfg(depths=ARCH["depths"], embed_dim=ARCH["embed_dims"])
    other = MultiScaleVit(cfg, img_size=(img_size, img_size), num_classes=5).eval()
    other.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), other))
    backbone = ours(img_size=img_size)
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert_parity(*last_maps(other, backbone, (img_size, img_size)), rms=1e-5, maximum=1e-4)
    expected = f"31 to {img_size // 2 - 1} distances, linear"
    assert report.resized["stages.0.blocks.0.attn.rel_pos_h"] == expected
    assert len(report.resized) == 2 * sum(ARCH["depths"])


def test_mvitv2_tiny_of_timm_fills_the_backbone_to_the_last_parameter():
    with torch.device("meta"):
        source = timm.create_model("mvitv2_tiny", pretrained=False).state_dict()
        target = CastlingMViT("tiny", attention="softmax", attn_cfg=dict(local_conv=None)).state_dict()
    found = _mvit_names(source)
    assert {k: v.shape for k, v in found.items() if k in target} == {
        k: v.shape for k, v in target.items() if not k.startswith(("norm0", "norm1", "norm2"))
    }
    assert {k for k in found if k not in target} == {"head.fc.weight", "head.fc.bias"}


def test_stages_that_are_not_built_are_dropped_by_name(model, saved):
    backbone = ours(out_indices=(0, 2))
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert report.dropped["stages.3.blocks.0.attn.qkv.weight"] == "the model has no stages.3.blocks.0"
    assert report.dropped["norm3.weight"] == "the model does not return this stage"
    assert report.vit_fraction == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch=dict(depths=(1, 2, 6, 1), embed_dims=8)), "are in it, expected at least min_fraction"),
        (dict(arch=dict(depths=(1, 2, 3, 1), embed_dims=16)), "shapes differ"),
        (dict(mlp_ratio=2.0), "shapes differ.*mlp_ratio"),
        (dict(qkv_bias=False), r"no place in the backbone.*qkv\.bias.*qkv_bias"),
    ],
)
def test_another_architecture_is_refused(options, message, model, assert_refused):
    assert_refused(ours(**options), model.state_dict(), message)


def test_a_plain_vit_and_an_absolute_position_embedding_are_refused(model, assert_refused):
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5).state_dict()
    assert_refused(ours(), vit, r"pos_embed.*take an MViTv2 without position embedding")
    with_positions = {**model.state_dict(), "pos_embed": torch.zeros(1, 257, 8)}
    assert_refused(ours(), with_positions, r"1 entries .* such as pos_embed")
