"""Initialisation from timm, DeiT and DINOv2 files: the same features as the source's, a full report."""

from __future__ import annotations

import pytest
import timm
import torch
from mmengine.registry import MODELS
from timm.models.vision_transformer import checkpoint_filter_fn

from castling_det.conversion import load_pretrained
from castling_det.models import CastlingMViT, CastlingViT
from tests.compare import assert_parity, errors
from tests.models.backbones import randomised, small

PLAIN, DINO = "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"
MODEL_OPTIONS = {
    PLAIN: {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": dict(num_reg_tokens=1),
    "vit_small_patch14_dinov2": dict(patch_size=14, init_values=1e-5),
    DINO: dict(patch_size=14, init_values=1e-5, num_reg_tokens=4),
}


def reference(name, img_size=224, **options):
    """timm's model with two blocks, every parameter random."""
    model = timm.create_model(name, depth=2, img_size=img_size, num_classes=5, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if "gamma" in key or ("norm" in key and key.endswith("weight")):
                parameter.add_(1)
    return model


def ours(model, attention="softmax", **options):
    heads = model.blocks[0].attn.num_heads
    options = dict(depth=2, num_heads=heads, attention=attention, with_cls_token=True) | options
    return CastlingViT(model.embed_dim, **options).eval()


@torch.inference_mode()
def feature_maps(model, backbone, size=224):
    """Both models' last map on one image."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    actual = backbone(image)[0]
    tokens = model.forward_features(image)
    tokens = tokens[0] if isinstance(tokens, tuple) else tokens
    expected = tokens[:, model.num_prefix_tokens :].transpose(1, 2).reshape(actual.shape)
    return actual, expected


@pytest.mark.parametrize("name", MODEL_OPTIONS)
def test_features_equal_timms(name, saved):
    model = reference(name)
    backbone = ours(model, **MODEL_OPTIONS[name])
    report = load_pretrained(backbone, saved(model.state_dict(), wrap="model"))
    actual, expected = feature_maps(model, backbone)
    assert_parity(actual, expected, rms=1e-5, maximum=1e-4, what=name)
    assert report.vit_fraction == 1 and report.fraction > 0.99
    assert all(".attn.dconv." in key for key in report.new)
    assert all(reason == "classification head" for reason in report.dropped.values())


def test_the_parity_check_sees_a_wrong_load(saved):
    model = reference(PLAIN)
    backbone = ours(model)
    load_pretrained(backbone, saved(model.state_dict()))
    actual, expected = feature_maps(model, backbone)
    good = errors(actual, expected)[0]
    with torch.no_grad():
        backbone.cls_token -= model.pos_embed[:, :1]  # as if the class token's position had been dropped
        wrong_token = errors(*feature_maps(model, backbone))[0]
        backbone.cls_token += model.pos_embed[:, :1]
        weight = backbone.blocks[1].attn.qkv.weight
        weight.copy_(weight.reshape(3, -1).roll(1, 0).reshape(weight.shape))  # q, k, v in another order
        wrong_order = errors(*feature_maps(model, backbone))[0]
    assert wrong_token > 100 * good and wrong_order > 100 * good and wrong_token > 1e-4


def test_dinov2s_own_names(saved):
    model = reference(DINO)
    state = model.state_dict()
    cls_position = torch.randn(1, 1, model.embed_dim)
    hub = {
        **{key: value for key, value in state.items() if key not in ("reg_token", "cls_token", "pos_embed")},
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - cls_position,
        "pos_embed": torch.cat([cls_position, state["pos_embed"]], dim=1),
        "mask_token": torch.randn(1, model.embed_dim),
    }
    backbone = ours(model, **MODEL_OPTIONS[DINO])
    teacher = {f"backbone.{key}": value for key, value in hub.items()} | {"dino_head.w": torch.zeros(1)}
    for path in (saved(hub, "hub.safetensors"), saved(teacher, "teacher.pth", wrap="teacher")):
        report = load_pretrained(backbone, path)
        assert_parity(*feature_maps(model, backbone), rms=1e-5, maximum=1e-4)
        assert report.dropped["mask_token"] == "only for masked-image training"
    assert report.dropped["dino_head.w"] == "not under 'backbone.'"


@pytest.mark.parametrize(("size", "patch_size"), [(160, 16), (224, 8), (112, 8)])
def test_positions_and_patches_are_resampled_as_timm_does(size, patch_size, saved):
    model = reference(PLAIN)
    other = reference(PLAIN, img_size=size, patch_size=patch_size)
    other.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), other))
    backbone = ours(model, img_size=size, patch_size=patch_size)
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert_parity(*feature_maps(other, backbone, size), rms=1e-5, maximum=1e-4)
    assert ("pos_embed" in report.resized) == (size // patch_size != 14)
    assert ("patch_embed.proj.weight" in report.resized) == (patch_size != 16)


def test_positions_on_a_grid_that_is_not_square(saved):
    model = reference(PLAIN)
    backbone = ours(model, img_size=(64, 128))
    load_pretrained(backbone, saved(model.state_dict()))
    expected = timm.layers.resample_abs_pos_embed(model.pos_embed, [4, 8], num_prefix_tokens=1)[:, 1:]
    torch.testing.assert_close(backbone.pos_embed, expected)


def test_a_conv_stem_and_missing_tokens_are_reported(saved):
    model = reference(PLAIN)
    backbone = ours(model, attention="castling", stem="conv", with_cls_token=False)
    before = backbone.state_dict()["stem.0.weight"].clone()
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert report.dropped["patch_embed.proj.weight"] == "the model has a convolutional stem"
    assert report.dropped["cls_token"] == "the model declares no such token"
    assert report.vit_fraction == 1 and 0.7 < report.fraction < 1
    assert torch.equal(backbone.state_dict()["stem.0.weight"], before)
    torch.testing.assert_close(backbone.blocks[1].attn.qkv.bias, model.blocks[1].attn.qkv.bias)
    text = str(report)
    assert "blocks.*.attn.dconv.weight (2)" in text and "classification head" in text and "100.0%" in text


BACKBONES = {
    "vit": lambda: CastlingViT(32, depth=2, num_heads=2, img_size=(32, 48), stem="conv", with_cls_token=True),
    "levit": lambda: small("levit"),
    "mvit": lambda: CastlingMViT(arch=dict(depths=(1, 2, 3, 1), embed_dims=8), attention="castling", img_size=64),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_detectors_backbone_loads_into_itself(name, saved):
    source, target = randomised(BACKBONES[name]()), BACKBONES[name]()
    detector = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    report = load_pretrained(target, saved(detector | {"bbox_head.w": torch.zeros(1)}, wrap="state_dict"))
    torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    assert report.fraction == 1 and not report.new and list(report.dropped) == ["bbox_head.w"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depth=12), "only 19.* are in it.*min_fraction=95%"),
        (dict(mlp_ratio=2.0), "shapes differ.*mlp_ratio"),
        (dict(qkv_bias=False), "no place in the backbone.*qkv.bias"),
        (dict(patch_size=14), "init_values"),  # layer scale
    ],
)
def test_another_architecture_is_refused(options, message, assert_refused):
    model = reference(DINO if "patch_size" in options else PLAIN)
    assert_refused(ours(model, **options), model.state_dict(), message)


def test_min_fraction_and_fewer_blocks(saved):
    model = reference(PLAIN)
    backbone = ours(model, depth=1)
    report = load_pretrained(backbone, saved(model.state_dict()))
    assert report.dropped["blocks.1.attn.qkv.weight"] == "the model has no blocks.1"
    with pytest.raises(ValueError, match="min_fraction=95: expected a share"):
        load_pretrained(backbone, "nowhere.pth", min_fraction=95)


def test_init_cfg_reads_the_file_before_training(saved):
    model = reference(PLAIN)
    path = str(saved(model.state_dict()))
    config = dict(type="castling_det.CastlingViT", embed_dims=192, depth=2, num_heads=3, attention="softmax")
    backbone = MODELS.build(
        dict(config, with_cls_token=True, init_cfg=dict(type="castling_det.Pretrained", checkpoint=path))
    ).eval()
    assert errors(*feature_maps(model, backbone))[0] > 0.1
    backbone.init_weights()
    assert_parity(*feature_maps(model, backbone), rms=1e-5, maximum=1e-4)
