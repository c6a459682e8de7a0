"""In softmax mode the backbones equal timm's VisionTransformer, Levit and MViTv2 with the same weights."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg, checkpoint_filter_fn
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from castling_det.layers import PooledAttention
from castling_det.models import CastlingLeViT, CastlingMViT, CastlingViT
from castling_det.models.levit import ARCHITECTURES
from castling_det.report.complexity import count_macs
from tests.compare import assert_parity, errors
from tests.models.backbones import MVIT, image, randomised, small, weighted_sum


def test_vit_equals_timm():
    sizes = dict(depth=3, num_heads=2, img_size=64, patch_size=16, init_values=0.1)
    model = VisionTransformer(embed_dim=32, class_token=False, global_pool="", num_classes=0, **sizes)
    reference = randomised(model.double()).eval()
    ours = CastlingViT(32, attention="softmax", attn_cfg=dict(local_conv=None), **sizes).double().eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = image(64, 64, dtype=torch.float64)
    tokens = ours(x)[0].flatten(2).transpose(1, 2)
    assert_parity(tokens, reference.forward_features(x), rms=1e-12, maximum=1e-11)
    with torch.no_grad():
        ours.pos_embed.copy_(ours.pos_embed.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))
    assert errors(ours(x)[0].flatten(2).transpose(1, 2), tokens)[0] > 1e-3


def levit_and_ours(arch):
    reference = timm.create_model(f"levit_{arch.lower()}", num_classes=0).double()
    ours = CastlingLeViT(arch, attention="softmax").double()
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(".dconv.weight") for name in missing)
    ours.load_state_dict(randomised(reference).state_dict(), strict=False)
    return reference, ours


def levit_maps(reference, x):
    fine = []
    handle = reference.stem.act3.register_forward_hook(lambda _, inputs, output: fine.append(output))
    stages = reference.forward_intermediates(x, intermediates_only=True)
    handle.remove()
    return fine + stages


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_levits_architectures_are_timms(arch):
    with torch.device("meta"):
        levit_and_ours(arch)


@pytest.mark.parametrize("arch", ["128S", "192"])
def test_levit_equals_timm_at_224(arch):
    reference, ours = (model.eval() for model in levit_and_ours(arch))
    x = image(224, 224, batch=1, dtype=torch.float64)
    with torch.no_grad():
        expected = levit_maps(reference, x)
        for stride, *pair in zip(ours.out_strides, ours(x), expected, strict=True):
            assert_parity(*pair, rms=1e-11, maximum=1e-10, what=f"stride {stride}")
        attn = ours.stages[0].blocks[1].attn
        table = attn.attention_biases
        right, side = table.clone(), round(table.shape[1] ** 0.5)
        table.copy_(right.unflatten(1, (side, side)).transpose(1, 2).flatten(1))  # distances across and down swapped
        assert errors(ours(x)[1], expected[1])[0] > 1e-4
        table.copy_(right)
        weight, heads = attn.qkv.linear.weight, attn.num_heads  # (q, k, v) by head, not head by head
        weight.copy_(weight.reshape(heads, 4, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape))
        assert errors(ours(x)[1], expected[1])[0] > 1e-4


def test_levit_trains_like_timm():
    """Statistics of the batch, their running averages, and the gradient of every parameter, biases included."""
    reference, ours = levit_and_ours("128S")
    x = image(224, 224, dtype=torch.float64)
    weighted_sum(levit_maps(reference.train(), x)).backward()
    weighted_sum(ours.train()(x)).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith("dconv.weight"):
            assert_parity(parameter.grad, expected[name].grad, rms=1e-8, maximum=1e-7, what=name)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("attention", ["softmax", "castling"])
def test_levit_starts_as_the_authors_do(attention):
    """Residual branches start as nothing, and so does the convolution beside softmax."""
    for name, parameter in small("levit", attention).named_parameters():
        if name.endswith("bn.weight"):
            start = 0 if name.endswith((".mlp.ln2.bn.weight", ".attn.proj.ln.bn.weight")) else 1
            assert (parameter == start).all(), name
        if name.endswith(".dconv.weight"):
            assert (parameter == 0).all() == (attention == "softmax")


@pytest.mark.parametrize(("arch", "published"), [("128S", 305), ("384", 2353)])
def test_levits_cost_at_224_is_the_published_one(arch, published):
    """LeViT's table counts exponentials as well and the classifiers, ours the local convolutions: within 3 percent."""
    found = count_macs(CastlingLeViT(arch, attention="softmax"), image(224, 224, batch=1))
    assert abs(found.macs / (published * 1e6) - 1) < 0.03


def mvit(img_size, **options):
    """timm's MViTv2 of the small sizes, random and in float64."""
    cfg = MultiScaleVitCfg(depths=MVIT["depths"], embed_dim=MVIT["embed_dims"])
    return randomised(MultiScaleVit(cfg, img_size=(img_size, img_size), num_classes=3, **options).double().eval())


def load_mvit(backbone, model):
    """By key; the norms and local convolutions that timm's has not stay as they are."""
    state = {re.sub(r"^norm\.", "norm3.", k): v for k, v in model.state_dict().items() if not k.startswith("head.")}
    result = backbone.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(".dconv." in name or name.startswith(("norm0", "norm1", "norm2")) for name in result.missing_keys)


def mvit_maps(model, backbone, x):
    """timm's stages, with our norms on the first three and its own on the last."""
    tokens, stages = model.forward_intermediates(x, norm=True)
    maps = [getattr(backbone, f"norm{i}")(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for i, m in enumerate(stages[:3])]
    assert_parity(stages[3].flatten(2).transpose(1, 2), tokens, rms=1e-15, maximum=1e-15)
    return [*maps, stages[3]]


def assert_maps_equal(actual, expected):
    for pair in zip(actual, expected, strict=True):
        assert_parity(*pair, rms=1e-12, maximum=1e-11)


@pytest.mark.parametrize("name", ["mvitv2_tiny", "mvitv2_small", "mvitv2_base"])
def test_mvits_architectures_are_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
        options = dict(attention="softmax", attn_cfg=dict(local_conv=None))
        backbone = CastlingMViT(name.removeprefix("mvitv2_"), **options)
    theirs = {k: v.shape for k, v in model.state_dict().items() if not k.startswith("norm.")}
    assert {k: v.shape for k, v in backbone.state_dict().items() if not k.startswith("norm")} == theirs
    for ours, other in zip(backbone.stages, model.stages, strict=True):
        for one, two in zip(ours["blocks"], other.blocks, strict=True):
            for pool in ("pool_q", "pool_k", "pool_v"):
                assert getattr(one.attn, pool).stride == getattr(two.attn, pool).stride
            assert one.attn.num_heads == two.attn.num_heads


def test_mvits_outputs_and_gradients_equal_timms():
    model, backbone = mvit(64), randomised(small("mvit", "softmax").double(), seed=3).eval()
    for module in backbone.modules():
        if isinstance(module, PooledAttention):
            nn.init.zeros_(module.dconv.weight)
    load_mvit(backbone, model)
    x = image(64, 64, dtype=torch.float64).requires_grad_()
    actual, expected = backbone(x), mvit_maps(model, backbone, x)
    assert_maps_equal(actual, expected)
    wrong = backbone.stages[2]["blocks"][1].attn
    wrong.rel_pos_h, wrong.rel_pos_w = wrong.rel_pos_w, wrong.rel_pos_h
    assert errors(backbone(x)[3], expected[3])[0] > 1e-6
    wrong.rel_pos_h, wrong.rel_pos_w = wrong.rel_pos_w, wrong.rel_pos_h
    gradients = []
    for maps, owner in ((actual, backbone), (expected, model)):
        blocks = {k: v for k, v in owner.named_parameters() if k.startswith(("stages", "patch")) and "dconv" not in k}
        values = torch.autograd.grad(weighted_sum(maps), [x, *blocks.values()])
        gradients.append(dict(zip(["image", *blocks], values, strict=True)))
    scale = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        if gradient.abs().max() < 1e-12 * scale:  # norm_k.bias: softmax does not see it
            assert name.endswith("norm_k.bias") and gradients[0][name].abs().max() < 1e-11 * scale
        else:
            assert_parity(gradients[0][name], gradient, rms=1e-10, maximum=1e-9, what=name)


@pytest.mark.parametrize("size", [(96, 160), (32, 64)], ids=str)
@torch.no_grad()
def test_mvit_at_another_size_equals_timm_with_resized_tables(size):
    """timm builds for squares: rows from a model of the height, columns from one of the width."""
    trained = mvit(64)
    model, columns = (mvit(side) for side in size)
    for one in (model, columns):
        one.load_state_dict(checkpoint_filter_fn(dict(trained.state_dict()), one))
    for stage, other in zip(model.stages, columns.stages, strict=True):
        for block, donor in zip(stage.blocks, other.blocks, strict=True):
            block.attn.rel_pos_w = donor.attn.rel_pos_w
    backbone = small("mvit", "softmax", attn_cfg=dict(local_conv=None)).double().eval()
    load_mvit(backbone, trained)
    x = image(*size, dtype=torch.float64)
    assert_maps_equal(backbone(x), mvit_maps(model, backbone, x))


def test_without_kv_pooling_the_grids_agree():
    backbone = small("mvit-unpooled")
    attentions = [module for module in backbone.modules() if isinstance(module, PooledAttention)]
    assert {(attn.stride_q, attn.stride_kv) for attn in attentions} == {(1, 1), (2, 2)}
    backbone.load_state_dict(small("mvit").state_dict(), strict=True)
