"""What the three backbones share: sizes, modes, options, freezing, checkpointing, padding, layer depths, errors."""

from __future__ import annotations

import pytest
import torch

from castling_det.layers import ATTENTION_MODES, AttentionOptions, MaskState, attention_layers
from tests.compare import assert_parity, errors
from tests.models.backbones import LEVIT, MVIT, VARIANTS, image, randomised, small, weighted_sum

FAMILIES = ("vit", "levit", "mvit")
STRIDES = {"vit": [16, 16], "vit-conv": [8, 8], "levit": [8, 16, 32, 64], "mvit": [4, 8, 16, 32]}
LAYERS = {
    "vit": ["blocks.0", "blocks.1", "blocks.2"],
    "levit": [
        *("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.downsample.attn_downsample", "stages.1.blocks.0"),
        *("stages.2.downsample.attn_downsample", "stages.2.blocks.0"),
    ],
    "mvit": [f"stages.{stage}.blocks.{block}" for stage, depth in enumerate(MVIT["depths"]) for block in range(depth)],
}


@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize(
    ("variant", "size"),
    [(variant, size) for variant in VARIANTS for size in ((64, 64), (32, 96))]
    # LeViT takes sizes that are no multiples of a stride.
    + [("levit", (70, 33)), ("levit", (65, 200)), ("levit", (1, 64))],
    ids=str,
)
def test_declared_channels_and_strides_are_those_of_a_forward(variant, size, attention):
    backbone = small(variant, attention).eval()
    assert backbone.out_strides == STRIDES[variant.removesuffix("-unpooled")]
    for feature, channels, stride in zip(
        backbone(image(*size)), backbone.out_channels, backbone.out_strides, strict=True
    ):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("out_indices", [(1,), (0, 2), (-2, -1)], ids=str)
def test_out_indices_choose_and_nothing_beyond_them_is_built(out_indices, family):
    whole = randomised(small(family, "linear", out_indices=range(3 if family == "vit" else 4))).eval()
    backbone = small(family, "linear", out_indices=out_indices).eval()
    missing, _ = backbone.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    x = image(64, 96)
    maps = whole(x)
    chosen = [range(len(maps))[index] for index in out_indices]
    for feature, index in zip(backbone(x), chosen, strict=True):
        assert torch.equal(feature, maps[index])
    assert backbone.out_strides == [whole.out_strides[index] for index in chosen]
    if family != "vit":
        assert len(backbone.stages) == max(chosen) + (family == "mvit")


@pytest.mark.parametrize("variant", VARIANTS)
def test_modes_share_their_parameters(variant):
    """`"softmax"` of LeViT and MViTv2 has position tables besides."""
    states = {mode: small(variant, mode).state_dict() for mode in ATTENTION_MODES}
    assert list(states["castling"]) == list(states["linear"])
    more = set(states["softmax"]) - set(states["linear"])
    assert all(name.endswith(("attention_biases", "rel_pos_h", "rel_pos_w")) for name in more)
    assert bool(more) == (not variant.startswith("vit"))
    assert all(states["softmax"][name].shape == value.shape for name, value in states["linear"].items())
    small(variant, "linear").load_state_dict(states["castling"], strict=True)


@pytest.mark.parametrize(
    "attn_cfg", [dict(normalizer="kernel", local_conv="tokens"), dict(local_conv=None, center_keys=True)], ids=str
)
@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_receives_a_gradient(variant, attention, attn_cfg):
    # Off their initial zeros: LeViT's last norm of a branch lets nothing through at first.
    backbone = randomised(small(variant, attention, attn_cfg=attn_cfg)).train()
    weighted_sum(backbone(image(128, 192))).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name
        # Softmax and centred keys do not change when all keys move by one vector: zero but for rounding.
        if not name.endswith("norm_k.bias") or (attention != "softmax" and "center_keys" not in attn_cfg):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eval_computes_what_is_deployed(variant, normalizer):
    """Bit for bit; and so does training once the mask is empty."""
    castling = randomised(small(variant, "castling", attn_cfg=dict(normalizer=normalizer, threshold=0.9))).eval()
    linear = small(variant, "linear", attn_cfg=dict(normalizer=normalizer)).eval()
    linear.load_state_dict(castling.state_dict(), strict=True)
    x = image(96, 160)
    assert all(torch.equal(*pair) for pair in zip(castling(x), linear(x), strict=True))
    for attn in attention_layers(castling).values():
        attn.eval_aux = True
    assert errors(castling(x)[-1], linear(x)[-1])[0] > 1e-4
    for attn in attention_layers(castling).values():
        attn.mask_state = MaskState(10000.0, "uniform")
    assert all(torch.equal(*pair) for pair in zip(castling.train()(x), linear.train()(x), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_options_reach_every_layer(family):
    attn_cfg = dict(normalizer="kernel", center_keys=True, local_conv="tokens", threshold=0.5, eval_aux=True)
    layers = attention_layers(small(family, attn_cfg=attn_cfg))
    assert list(layers) == LAYERS[family]
    given = AttentionOptions(mode="castling", threshold_unit="uniform", **attn_cfg)
    assert all(layer.options == given for layer in layers.values())
    kernels = small(family, attn_cfg=dict(local_conv_kernel_size=5)).state_dict().items()
    assert {value.shape[-1] for name, value in kernels if name.endswith("dconv.weight")} == {5}


@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_nothing(variant, attention):
    """Gradients, and the running statistics, which a repeated forward would move twice."""
    plain = randomised(small(variant, attention))
    recomputed = small(variant, attention, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    x = image(128, 128)
    for backbone in (plain, recomputed):
        weighted_sum(backbone.train()(x)).backward()
    # A gradient that is zero but for rounding is not compared with itself.
    scale = max(parameter.grad.abs().max() for parameter in plain.parameters())
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if one.grad.abs().max() > 1e-5 * scale:
            assert_parity(other.grad, one.grad, rms=1e-5, maximum=1e-4, what=name)
    for (name, one), other in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("variant", "frozen"),
    [
        ("vit", ("patch_embed.", "pos_embed", "blocks.0.")),
        ("vit-conv", ("stem.", "pos_embed", "cls_token", "reg_token", "blocks.0.")),
        ("levit", ("stem.", "stages.0.")),
        ("mvit", ("patch_embed.", "stages.0.")),
    ],
)
def test_frozen_stages(variant, frozen):
    """No gradients, no moving statistics and no dropping in the stem and the first stage."""
    backbone = small(variant, frozen_stages=1, drop_path_rate=0.3)
    assert backbone.eval() is backbone and backbone.train() is backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    weighted_sum(backbone(image(128, 128))).backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in backbone.named_parameters() if not name.startswith(frozen)}
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(before[name], value)}
    assert bool(moved) == (variant == "levit") and not any(name.startswith(frozen) for name in moved)
    stages = backbone.blocks if variant.startswith("vit") else backbone.stages
    assert not any(module.training for module in stages[0].modules()) and stages[1].training
    assert all(parameter.requires_grad for parameter in small(variant).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_asked_for_or_refused(family):
    x, divisor = image(50, 70), {"vit": 16, "levit": 64, "mvit": 32}[family]
    if family == "levit":
        assert [tuple(m.shape[-2:]) for m in small(family)(x)] == [(7, 9), (4, 5), (2, 3), (1, 2)]
    else:
        with pytest.raises(ValueError, match=rf"50 x 70 pixels: expected multiples of {divisor}.*divisor={divisor}"):
            small(family)(x)
    padded = small(family, pad_input=True).eval()
    explicit = torch.nn.functional.pad(x, (0, -70 % divisor, 0, -50 % divisor))
    assert all(torch.equal(*pair) for pair in zip(padded(x), padded(explicit), strict=True))
    assert padded(x)[-1].shape[-2:] == (-(-50 // divisor), -(-70 // divisor))


@pytest.mark.parametrize(
    ("family", "depths"),
    [
        ("vit", {"pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.2.norm1.bias": 3, "norm.weight": 4}),
        (
            "levit",
            {"stem.conv4.bn.weight": 0, "stages.0.blocks.1.attn.qkv.linear.weight": 2}
            | {"stages.1.downsample.mlp.ln1.bn.bias": 3, "stages.2.blocks.0.attn.dconv.weight": 6},
        ),
        (
            "mvit",
            {"patch_embed.proj.weight": 0, "stages.2.blocks.1.norm1.bias": 5, "stages.3.blocks.0.mlp.fc1.bias": 6}
            | {"norm0.weight": 7},
        ),
    ],
)
def test_layer_depth(family, depths):
    backbone = small(family)
    num_layers = len(LAYERS[family]) + 2
    found = {name: backbone.get_layer_depth(f"backbone.{name}", "backbone.") for name, _ in backbone.named_parameters()}
    assert {name: found[name] for name in depths} == {name: (depth, num_layers) for name, depth in depths.items()}
    assert {depth for depth, _ in found.values()} == set(range(num_layers - (family == "levit")))
    assert backbone.get_layer_depth("neck.conv.weight", "backbone.") == (num_layers - 1, num_layers)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", dict(attention="fast"), r"attention='fast': expected one of"),
        ("vit", dict(attn_cfg=dict(threshold=-1.0)), r"threshold=-1.0"),
        ("vit", dict(attn_cfg=dict(mode="linear")), r"attn_cfg.mode: no such option"),
        *((family, dict(out_indices=(2, 1)), r"out_indices=\(2, 1\): expected ascending") for family in FAMILIES),
        *((family, dict(out_indices=(4,)), r"out_indices=\(4,\): expected ascending") for family in FAMILIES),
        *((family, dict(frozen_stages=5), r"frozen_stages=5: expected -1 \(none\) to [34]") for family in FAMILIES),
        *((family, dict(img_size=8), r"img_size=8: expected") for family in FAMILIES),
        ("vit", dict(attn_cfg=dict(treshold=1.0)), r"attn_cfg.treshold: no such option; expected some of normalizer,"),
        ("vit", dict(attention="linear", attn_cfg=dict(eval_aux=True)), r"eval_aux=True: only mode='castling'"),
        ("vit", dict(stem="resnet"), r"stem='resnet': expected one of"),
        ("vit", dict(num_heads=3), r"num_heads=3: expected a divisor of dim=32"),
        ("vit", dict(stem="conv", patch_size=12), r"patch_size=12: a convolutional stem needs a power of two"),
        ("levit", dict(arch="512"), r"arch='512': expected one of '128S'"),
        ("levit", dict(arch=dict(embed_dims=(16,))), r"expected a dict of embed_dims, num_heads, depths, key_dim"),
        ("levit", dict(arch=dict(LEVIT, depths=(1, 1))), r"expected one number a stage"),
        ("levit", dict(arch=dict(LEVIT, embed_dims=(12, 24, 32))), r"embed_dims=\(12, 24, 32\).*multiple of 8"),
        ("levit", dict(out_indices=(0,)), r"out_indices=\(0,\): expected ascending.*at least 1"),
        ("mvit", dict(arch="large"), r"arch='large': expected one of 'tiny', 'small', 'base'"),
        ("mvit", dict(arch=dict(depth=(1, 2))), r"arch=\{'depth': \(1, 2\)\}: expected a dict of depths"),
        ("mvit", dict(arch=dict(depths=(1, 0))), r"arch\.depths=\(1, 0\): expected one block or more a stage"),
        ("mvit", dict(out_indices=()), r"out_indices=\(\)"),
        ("mvit", dict(img_size=100), r"img_size=100: expected multiples of 32"),
        ("mvit", dict(attn_cfg=dict(local_conv_kernel_size=2)), r"local_conv_kernel_size=2"),
    ],
)
def test_errors_name_the_field(family, options, message):
    with pytest.raises(ValueError, match=message):
        small(family, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misspelled_option_fails(family):
    with pytest.raises(TypeError, match="drop_rates"):
        small(family, drop_rates=0.1)
