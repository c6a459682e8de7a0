"""`CastlingMViT`: equal to timm's MViTv2 in softmax mode, shapes, modes, freezing, checkpointing, errors."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from mmdet.registry import MODELS
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg, checkpoint_filter_fn
from torch import nn

from castling_det.engine.mask_annealing import castling_layers
from castling_det.layers import ATTENTION_MODES, PooledAttention
from castling_det.models import CastlingMViT
from castling_det.report.complexity import count_macs
from tests.compare import assert_parity, errors
from tests.layers.test_attention import randomised

DEPTHS = (1, 2, 2, 1)
TINY = dict(depths=DEPTHS, embed_dims=8)


def small(attention="castling", **options):
    return CastlingMViT(**{"arch": TINY, "attention": attention, "img_size": 64, **options})


def timms(img_size):
    cfg = MultiScaleVitCfg(depths=DEPTHS, embed_dim=8)
    return randomised(MultiScaleVit(cfg, img_size=(img_size, img_size), num_classes=3).double().eval())


def load_timms(backbone, model):
    """By key; the norms and local convolutions that timm's has not stay as they are."""
    state = {re.sub(r"^norm\.", "norm3.", k): v for k, v in model.state_dict().items() if not k.startswith("head.")}
    result = backbone.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(".dconv." in name or name.startswith(("norm0", "norm1", "norm2")) for name in result.missing_keys)


def expected_maps(model, backbone, image):
    """timm's stages, and our norms on them; its own norm on the last."""
    tokens, stages = model.forward_intermediates(image, norm=True)
    maps = [getattr(backbone, f"norm{i}")(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for i, m in enumerate(stages[:3])]
    assert_parity(stages[3].flatten(2).transpose(1, 2), tokens, rms=1e-15, maximum=1e-15)
    return [*maps, stages[3]]


def test_mvitv2_tiny_equals_timms_with_the_same_weights():
    model = randomised(timm.create_model("mvitv2_tiny", pretrained=False, num_classes=3).double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    backbone = randomised(CastlingMViT("tiny", attention="softmax", local_conv=None).double(), seed=3).eval()
    load_timms(backbone, model)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        for actual, expected in zip(backbone(image), expected_maps(model, backbone, image), strict=True):
            assert_parity(actual, expected, rms=1e-12, maximum=1e-11)
        wrong = backbone.stages[2]["blocks"][1].attn
        wrong.rel_pos_h, wrong.rel_pos_w = wrong.rel_pos_w, wrong.rel_pos_h
        assert errors(backbone(image)[3], expected)[0] > 1e-6


@pytest.mark.parametrize("name", ["mvitv2_small", "mvitv2_base"])
def test_architectures_are_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
        backbone = CastlingMViT(name.removeprefix("mvitv2_"), attention="softmax", local_conv=None)
    theirs = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("norm.")}
    assert {k: v.shape for k, v in backbone.state_dict().items() if not k.startswith("norm")} == theirs
    for ours, other in zip(backbone.stages, model.stages, strict=True):
        for one, two in zip(ours["blocks"], other.blocks, strict=True):
            for pool in ("pool_q", "pool_k", "pool_v"):
                assert getattr(one.attn, pool).stride == getattr(two.attn, pool).stride
            assert one.attn.num_heads == two.attn.num_heads


def test_outputs_and_gradients_equal_timms():
    model, backbone = timms(64), randomised(small("softmax").double(), seed=3).eval()
    for module in backbone.modules():
        if isinstance(module, PooledAttention):
            nn.init.zeros_(module.dconv.weight)
    load_timms(backbone, model)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    actual, expected = backbone(image), expected_maps(model, backbone, image)
    weights = [torch.linspace(-1, 1, m.numel(), dtype=torch.float64).reshape(m.shape) for m in actual]
    gradients = []
    for maps, owner in ((actual, backbone), (expected, model)):
        blocks = {k: v for k, v in owner.named_parameters() if k.startswith(("stages", "patch")) and "dconv" not in k}
        loss = sum((m * w).sum() for m, w in zip(maps, weights, strict=True))
        values = torch.autograd.grad(loss, [image, *blocks.values()])
        gradients.append(dict(zip(["image", *blocks], values, strict=True)))
    for one, other in zip(actual, expected, strict=True):
        assert_parity(one, other, rms=1e-12, maximum=1e-11)
    scale = max(g.abs().max() for g in gradients[1].values())
    for name, expected_gradient in gradients[1].items():
        if expected_gradient.abs().max() < 1e-12 * scale:  # norm_k.bias: softmax does not see it
            assert name.endswith("norm_k.bias") and gradients[0][name].abs().max() < 1e-11 * scale
        else:
            assert_parity(gradients[0][name], expected_gradient, rms=1e-10, maximum=1e-9, what=name)


@pytest.mark.parametrize("size", [(96, 160), (160, 64), (32, 64)], ids=str)
def test_another_size_equals_timms_with_resized_tables(size):
    """timm builds for squares: rows from a model of the height, columns from one of the width."""
    master = timms(64)
    models = []
    for side in size:
        model = timms(side)
        model.load_state_dict(checkpoint_filter_fn(dict(master.state_dict()), model))
        models.append(model)
    model = models[0]
    for stage, other in zip(model.stages, models[1].stages, strict=True):
        for block, donor in zip(stage.blocks, other.blocks, strict=True):
            block.attn.rel_pos_w = donor.attn.rel_pos_w
    backbone = small("softmax", local_conv=None).double().eval()
    load_timms(backbone, master)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        actual, expected = backbone(image), expected_maps(model, backbone, image)
    for one, other in zip(actual, expected, strict=True):
        assert_parity(one, other, rms=1e-12, maximum=1e-11)


@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize("kv_pooling", [True, False])
@pytest.mark.parametrize(
    ("size", "out_indices"), [((64, 64), (0, 1, 2, 3)), ((32, 96), (1, 2, 3)), ((48, 16), (0, 2)), ((64, 32), (-1,))]
)
def test_declared_channels_and_strides_are_those_of_a_forward(size, out_indices, kv_pooling, attention):
    backbone = small(attention, kv_pooling=kv_pooling, out_indices=out_indices)
    maps = backbone(torch.randn(2, 3, *size))
    assert len(maps) == len(out_indices)
    for feature, channels, stride in zip(maps, backbone.out_channels, backbone.out_strides, strict=True):
        assert feature.shape == (2, channels, size[0] // stride, size[1] // stride)


def test_builds_through_mmdets_registry():
    backbone = MODELS.build(dict(type="castling_det.CastlingMViT", arch="tiny", attention="linear", out_indices=(0, 1)))
    assert backbone.out_channels == [96, 192] and backbone.out_strides == [4, 8] and backbone.depths == (1, 2)
    assert [tuple(m.shape) for m in backbone(torch.randn(1, 3, 32, 48))] == [(1, 96, 8, 12), (1, 192, 4, 6)]


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("kv_pooling", [True, False])
@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_every_parameter_receives_a_gradient(attention, kv_pooling, normalizer):
    options = dict(kv_pooling=kv_pooling, normalizer=normalizer, threshold=0.9, threshold_unit="uniform")
    backbone = small(attention, **options)
    maps = backbone(torch.randn(2, 3, 64, 96))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        # Softmax does not change when all keys move by one vector: this one is zero but for rounding, in MViTv2 too.
        if attention != "softmax" or not name.endswith("norm_k.bias"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kv_pooling", [True, False])
def test_castling_is_linear_in_eval_bit_for_bit(kv_pooling):
    options = dict(kv_pooling=kv_pooling, threshold=0.9, threshold_unit="uniform")
    castling, linear = small("castling", **options), small("linear", **options)
    randomised(castling)
    linear.load_state_dict(castling.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96)
    hybrid = castling.train()(x)
    for one, other, trained in zip(castling.eval()(x), linear.eval()(x), hybrid, strict=True):
        assert torch.equal(one, other)
        assert errors(trained, one)[0] > 1e-4
    softmax = small("softmax", kv_pooling=kv_pooling)
    assert all("rel_pos_" in name for name in softmax.state_dict().keys() ^ linear.state_dict().keys())


def test_the_hook_finds_every_block():
    names = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "stages.2.blocks.0", "stages.2.blocks.1"]
    assert list(castling_layers(small("castling"))) == [*names, "stages.3.blocks.0"]
    assert not castling_layers(small("linear")) and not castling_layers(small("softmax"))


def test_without_kv_pooling_the_grids_agree():
    strides = {
        (attn.stride_q, attn.stride_kv)
        for attn in small(kv_pooling=False).modules()
        if isinstance(attn, PooledAttention)
    }
    assert strides == {(1, 1), (2, 2)}
    with_pooling = small(kv_pooling=True).state_dict()
    small(kv_pooling=False).load_state_dict(with_pooling, strict=True)


def test_linear_attention_grows_with_the_pixels():
    def scores(attention, side):
        backbone = small(attention, kv_pooling=False)
        return count_macs(backbone, torch.randn(1, 3, side, side)).macs_by_kind["attention"]

    assert scores("linear", 128) == 4 * scores("linear", 64)
    # The relative positions' share grows with N ** 1.5.
    assert 15 * scores("softmax", 64) < scores("softmax", 128) < 16 * scores("softmax", 64)


def test_padding_is_asked_for_or_refused():
    x = torch.randn(1, 3, 50, 70)
    with pytest.raises(ValueError, match=r"image of 50 x 70 pixels: expected multiples of 32.*pad_size_divisor=32"):
        small()(x)
    padded = small(pad_input=True).eval()
    explicit = torch.nn.functional.pad(x, (0, 26, 0, 14))
    for one, other in zip(padded(x), padded(explicit), strict=True):
        assert torch.equal(one, other)
    assert padded(x)[3].shape == (1, 64, 2, 3)


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_checkpointing_changes_nothing(attention):
    plain, recomputed = (small(attention, threshold_unit="uniform", with_cp=with_cp) for with_cp in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for backbone in (plain, recomputed):
        sum(m[:, 0].square().sum() for m in backbone.train()(x)).backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert_parity(one.grad, other.grad, rms=1e-6, maximum=1e-5, what=name)


def test_frozen_stages():
    backbone = small(frozen_stages=2, drop_path_rate=0.3)
    assert backbone.train() is backbone and backbone.eval() is backbone
    backbone.train()
    sum(m.sum() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith(("stages.2.", "stages.3.", "norm")) for name in trained)
    assert not backbone.stages[1]["blocks"][0].training and backbone.stages[2]["blocks"][0].training
    assert all(p.requires_grad for p in small(frozen_stages=-1).parameters())


def test_stochastic_depth_grows_as_timms():
    cfg = MultiScaleVitCfg(depths=DEPTHS, embed_dim=8)
    model = MultiScaleVit(cfg, img_size=(64, 64), drop_path_rate=0.3)

    def rates(owner):
        return [getattr(m, "drop_prob", 0.0) for name, m in owner.named_modules() if name.endswith("drop_path1")]

    assert rates(small(drop_path_rate=0.3)) == rates(model) and len(rates(model)) == 6


def test_layer_depth():
    backbone = small()
    depth = lambda name: backbone.get_layer_depth(name, "backbone.")  # noqa: E731
    assert depth("backbone.patch_embed.proj.weight") == (0, 8)
    assert depth("backbone.stages.0.blocks.0.attn.qkv.weight") == (1, 8)
    assert depth("backbone.stages.2.blocks.1.norm1.bias") == (5, 8)
    assert depth("backbone.stages.3.blocks.0.mlp.fc1.bias") == (6, 8)
    assert depth("backbone.norm0.weight") == depth("neck.conv.weight") == (7, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="fast"), r"attention='fast': expected one of"),
        (dict(arch="large"), r"arch='large': expected one of 'tiny', 'small', 'base'"),
        (dict(arch=dict(depth=(1, 2))), r"arch=\{'depth': \(1, 2\)\}: expected `depths`"),
        (dict(arch=dict(depths=(1, 0))), r"arch\.depths=\(1, 0\): expected one block or more a stage"),
        (dict(out_indices=(4,)), r"out_indices=\(4,\): expected ascending"),
        (dict(out_indices=(2, 0)), r"out_indices=\(2, 0\)"),
        (dict(out_indices=()), r"out_indices=\(\)"),
        (dict(frozen_stages=5), r"frozen_stages=5: expected -1 \(none\) to 4"),
        (dict(img_size=100), r"img_size=100: expected multiples of 32"),
        (dict(threshold=-1), r"threshold=-1"),
        (dict(local_conv_kernel_size=2), r"local_conv_kernel_size=2"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_misspelled_option_fails():
    with pytest.raises(TypeError, match="embed_dims"):
        CastlingMViT(embed_dims=32)
