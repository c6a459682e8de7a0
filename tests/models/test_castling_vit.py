"""`CastlingViT`: shapes, sizes, options, freezing, checkpointing, layer depth, errors."""

from __future__ import annotations

import pytest
import torch

from castling_det.layers import ATTENTION_MODES
from castling_det.models import CastlingViT
from tests.compare import assert_parity, errors
from tests.layers.test_attention import randomised


def small(attention="castling", **options):
    defaults = dict(depth=3, num_heads=2, img_size=64, patch_size=16, attention=attention)
    return CastlingViT(32, **{**defaults, **options})


@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("patch_size", [8, 16])
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16)], ids=str)
def test_declared_channels_and_strides_are_those_of_a_forward(size, patch_size, stem):
    backbone = small(stem=stem, patch_size=patch_size, out_indices=(0, -1)).eval()
    maps = backbone(torch.randn(2, 3, *size))
    assert len(maps) == 2
    for feature, channels, stride in zip(maps, backbone.out_channels, backbone.out_strides, strict=True):
        assert feature.shape == (2, channels, size[0] // stride, size[1] // stride)


def test_state_dict_is_the_same_in_every_mode():
    shapes = [{k: v.shape for k, v in small(mode).state_dict().items()} for mode in ATTENTION_MODES]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_every_parameter_receives_a_gradient(attention, stem):
    prefix = dict(with_cls_token=True, num_reg_tokens=2)
    backbone = small(attention, stem=stem, init_values=1e-2, threshold_unit="uniform", **prefix)
    out = backbone(torch.randn(2, 3, 32, 48))[0]
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_position_embedding_is_interpolated_to_the_grid():
    backbone = randomised(small(depth=1, attention="linear")).eval()
    with torch.no_grad():
        backbone.pos_embed.copy_(torch.linspace(0, 1, 4)[None, :, None].repeat(1, 4, 32))
    wide = backbone._position_embedding((4, 8)).reshape(4, 8, 32)
    # Columns go from 0 to 1 on any grid, rows are constant: a transposed grid would show.
    assert (wide[:, 1:, 0] > wide[:, :-1, 0]).all() and torch.allclose(wide[0], wide[3], atol=1e-5)
    assert backbone._position_embedding((4, 4)) is backbone.pos_embed


def test_prefix_tokens_join_the_attention_and_are_dropped():
    backbone = randomised(small("linear", with_cls_token=True, num_reg_tokens=2)).eval()
    x = torch.randn(1, 3, 64, 64)
    before = backbone(x)[0]
    assert before.shape == (1, 32, 4, 4)
    with torch.no_grad():
        backbone.cls_token.mul_(5)
    assert errors(backbone(x)[0], before)[0] > 1e-5


def test_padding_is_asked_for_or_refused():
    x = torch.randn(1, 3, 50, 70)
    with pytest.raises(ValueError, match=r"image of 50 x 70 pixels: expected multiples of patch_size=16.*divisor=16"):
        small()(x)
    with pytest.raises(ValueError, match=r"image of 9 x 64 pixels: expected at least patch_size=16"):
        small()(torch.randn(1, 3, 9, 64))
    padded = small(pad_input=True).eval()
    assert padded(x)[0].shape == (1, 32, 4, 5)
    explicit = torch.nn.functional.pad(x, (0, 10, 0, 14))
    assert torch.equal(padded(x)[0], padded(explicit)[0])


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_checkpointing_changes_nothing(attention):
    torch.manual_seed(0)
    plain = small(attention, threshold_unit="uniform")
    recomputed = small(attention, threshold_unit="uniform", with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for backbone in (plain, recomputed):
        backbone.train()(x)[0].square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert_parity(one.grad, other.grad, rms=1e-6, maximum=1e-5, what=name)


def test_frozen_stages():
    backbone = small(frozen_stages=2, stem="conv", drop_path_rate=0.3)
    assert backbone.train() is backbone and backbone.eval() is backbone
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))[0].sum().backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith(("blocks.2.", "norm.")) for name in trained)
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items()), "BatchNorm of a frozen stem moved"
    assert not backbone.blocks[1].training and backbone.blocks[2].training
    assert all(p.requires_grad for p in small(frozen_stages=-1).parameters())


def test_layer_depth():
    backbone = small(depth=3)
    depth = lambda name: backbone.get_layer_depth(name, "backbone.")  # noqa: E731
    assert depth("backbone.pos_embed") == depth("backbone.patch_embed.proj.weight") == (0, 5)
    assert depth("backbone.blocks.0.attn.qkv.weight") == (1, 5) and depth("backbone.blocks.2.norm1.bias") == (3, 5)
    assert depth("backbone.norm.weight") == depth("neck.conv.weight") == (4, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="fast"), r"attention='fast': expected one of"),
        (dict(stem="resnet"), r"stem='resnet': expected one of"),
        (dict(num_heads=3), r"num_heads=3: expected a divisor of dim=32"),
        (dict(out_indices=(3,)), r"out_indices=\(3,\): expected ascending"),
        (dict(out_indices=(2, 0)), r"out_indices=\(2, 0\)"),
        (dict(frozen_stages=4), r"frozen_stages=4: expected -1 \(none\) to depth=3"),
        (dict(img_size=8), r"img_size=8: expected at least patch_size=16"),
        (dict(stem="conv", patch_size=12), r"patch_size=12: a convolutional stem needs a power of two"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_misspelled_option_fails():
    with pytest.raises(TypeError, match="embed_dim"):
        CastlingViT(embed_dim=32)
