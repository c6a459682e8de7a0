"""`CastlingLeViT`: timm's LeViT in softmax mode, sizes, modes, fusion, freezing, checkpointing, conversion, errors."""

from __future__ import annotations

import pytest
import timm
import torch
from mmdet.registry import MODELS

from castling_det.conversion.probes import castling_layers as layers_to_convert
from castling_det.engine.mask_annealing import castling_layers as layers_to_anneal
from castling_det.layers import ATTENTION_MODES, LevitAttention
from castling_det.models import CastlingLeViT
from castling_det.models.backbones.castling_levit import ARCHITECTURES
from castling_det.report.complexity import count_macs
from tests.compare import assert_parity, errors
from tests.layers.test_levit import randomised as randomised_layer
from tests.stacks import needs_torch

SMALL = dict(embed_dims=(16, 24, 32), num_heads=(2, 2, 3), depths=(2, 1, 1), key_dim=8)
BLOCKS = ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.downsample.attn_downsample", "stages.1.blocks.0"]
BLOCKS += ["stages.2.downsample.attn_downsample", "stages.2.blocks.0"]


def small(attention="castling", arch=SMALL, **options):
    return CastlingLeViT(arch, attention=attention, **{"threshold_unit": "uniform", **options})


def randomised(model, seed=0):
    """Every parameter and statistic drawn anew, scaled so that the features stay of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value.copy_(noise.abs() + 0.5)
            elif name.endswith("bn.weight"):
                value.copy_(1 + 0.2 * noise)
            elif name.endswith("attention_biases"):
                value.copy_(noise)
            elif value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            elif value.is_floating_point():
                value.copy_(noise * 0.2)
    return model


def attention_layers(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LevitAttention)]


def image(*size, batch=2, dtype=torch.float32, seed=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def timm_and_ours(arch):
    """timm's model and ours in softmax mode with the same random weights, in float64."""
    reference = randomised(timm.create_model(f"levit_{arch.lower()}", num_classes=0).double())
    ours = CastlingLeViT(arch, attention="softmax").double()
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(".dconv.weight") for name in missing)
    return reference, ours


def timms_maps(reference, x):
    fine = []
    handle = reference.stem.act3.register_forward_hook(lambda _, inputs, output: fine.append(output))
    stages = reference.forward_intermediates(x, intermediates_only=True)
    handle.remove()
    return fine + stages


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_equals_timm_at_224(arch):
    reference, ours = timm_and_ours(arch)
    reference.eval()
    ours.eval()
    x = image(224, 224, batch=1, dtype=torch.float64)
    with torch.no_grad():
        for stride, actual, expected in zip(ours.out_strides, ours(x), timms_maps(reference, x), strict=True):
            assert_parity(actual, expected, rms=1e-11, maximum=1e-10, what=f"stride {stride}")


def test_trains_like_timm_at_224():
    """Statistics of the batch, their running averages, and the gradient of every parameter, biases included."""
    reference, ours = timm_and_ours("128S")
    x = image(224, 224, dtype=torch.float64)
    for model, maps in ((reference, timms_maps), (ours, lambda model, x: model(x))):
        outputs = maps(model.train(), x)
        sum((out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum() for out in outputs).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith("dconv.weight"):
            assert_parity(parameter.grad, expected[name].grad, rms=1e-8, maximum=1e-7, what=name)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_the_parity_check_sees_a_wrong_bias_and_a_wrong_order():
    reference, ours = timm_and_ours("128S")
    reference.eval()
    ours.eval()
    x = image(224, 224, batch=1, dtype=torch.float64)
    with torch.no_grad():
        expected = timms_maps(reference, x)[1]
        attn = ours.stages[0].blocks[1].attn
        table = attn.attention_biases
        right = table.clone()
        table.copy_(right.reshape(4, 14, 14).transpose(1, 2).reshape(4, 196))  # distances across and down swapped
        assert errors(ours(x)[1], expected)[0] > 1e-4
        table.copy_(right)
        weight = attn.qkv.linear.weight  # (q, k, v) by head, not head by head
        weight.copy_(weight.reshape(4, 4, 16, 128).transpose(0, 1).reshape(weight.shape))
        assert errors(ours(x)[1], expected)[0] > 1e-4


@pytest.mark.parametrize("attention", ATTENTION_MODES)
@pytest.mark.parametrize("size", [(64, 128), (224, 224), (70, 33), (65, 200), (1, 64)], ids=str)
def test_declared_channels_and_strides_are_those_of_a_forward(size, attention):
    backbone = small(attention).eval()
    maps = backbone(image(*size))
    assert backbone.out_strides == [8, 16, 32, 64] and backbone.out_channels == [8, 16, 24, 32]
    for feature, channels, stride in zip(maps, backbone.out_channels, backbone.out_strides, strict=True):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_of_architectures(arch):
    """Widths as declared, and parameters as derived: those of timm's LeViT and a 3x3 kernel for each value channel."""
    backbone = CastlingLeViT(arch, attention="softmax")
    dims, heads, depths, key_dim = ARCHITECTURES[arch]
    assert backbone.out_channels == [dims[0] // 2, *dims]
    reference = timm.create_model(f"levit_{arch.lower()}", num_classes=0)
    values = sum(depth * number * 2 * key_dim for depth, number in zip(depths, heads, strict=True))
    values += sum(4 * dim for dim in dims[:-1])
    expected = sum(p.numel() for p in reference.parameters()) + 9 * values
    assert sum(p.numel() for p in backbone.parameters()) == expected


@pytest.mark.parametrize("out_indices", [(1,), (0, 2), (-2, -1), (1, 2, 3)], ids=str)
def test_out_indices_choose_and_nothing_beyond_them_is_built(out_indices):
    backbone, whole = small("linear", out_indices=out_indices).eval(), small("linear").eval()
    missing, _ = backbone.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    x = image(64, 96)
    chosen = [range(4)[index] for index in out_indices]
    for feature, index in zip(backbone(x), chosen, strict=True):
        assert torch.equal(feature, whole(x)[index])
    assert len(backbone.stages) == max(chosen)
    assert backbone.out_strides == [whole.out_strides[index] for index in chosen]


def test_modes_differ_by_the_biases_alone():
    states = {mode: small(mode).state_dict() for mode in ATTENTION_MODES}
    assert list(states["castling"]) == list(states["linear"])
    more = set(states["softmax"]) - set(states["linear"])
    assert more == {f"{name}.attention_biases" for name, _ in attention_layers(small("softmax"))}
    assert all(states["softmax"][name].shape == value.shape for name, value in states["linear"].items())
    small("linear").load_state_dict(states["castling"], strict=True)


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
@pytest.mark.parametrize("local_conv", ["image", "tokens", None])
@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_every_parameter_receives_a_gradient(attention, local_conv, normalizer):
    # Off their initial zeros, which let nothing through: the last norm of a branch.
    backbone = randomised(small(attention, normalizer=normalizer, local_conv=local_conv, threshold=1.0)).train()
    outputs = backbone(image(128, 192))
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_starts_as_levit_does(attention):
    """Residual branches start as nothing, and softmax' convolution too."""
    backbone = small(attention).eval()
    for name, parameter in backbone.named_parameters():
        if name.endswith((".mlp.ln2.bn.weight", ".attn.proj.ln.bn.weight")):
            assert (parameter == 0).all()
        elif name.endswith("bn.weight"):
            assert (parameter == 1).all(), name
        if name.endswith(".dconv.weight"):
            assert (parameter == 0).all() == (attention == "softmax")


@pytest.mark.parametrize("normalizer", ["l2", "kernel"])
def test_eval_computes_what_is_deployed(normalizer):
    castling = randomised(small("castling", normalizer=normalizer, threshold=0.9)).eval()
    linear = small("linear", normalizer=normalizer).eval()
    linear.load_state_dict(castling.state_dict(), strict=True)
    x = image(96, 136)
    assert all(torch.equal(*pair) for pair in zip(castling(x), linear(x), strict=True))
    for attn in layers_to_anneal(castling).values():
        attn.eval_aux = True
    assert errors(castling(x)[-1], linear(x)[-1])[0] > 1e-3
    for attn in layers_to_anneal(castling).values():
        attn.threshold = 1000.0
    castling.train()
    linear.train()
    assert all(torch.equal(*pair) for pair in zip(castling(x), linear(x), strict=True))


def test_hook_and_conversion_find_every_layer():
    backbone = small("castling")
    assert list(layers_to_anneal(backbone)) == BLOCKS == list(layers_to_convert(backbone))
    assert not layers_to_anneal(small("linear")) and not layers_to_anneal(small("softmax"))
    backbone(image(64, 64))
    assert all(0 < attn.mask_stats.kept_fraction <= 1 for attn in layers_to_anneal(backbone).values())


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_fused_for_deployment_it_computes_the_same(attention):
    backbone = randomised_layer(small(attention)).eval()
    x = image(70, 130, dtype=torch.float64)
    before = backbone(x)
    assert backbone.fuse() is backbone
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    for one, other in zip(backbone(x), before, strict=True):
        assert_parity(one, other, rms=1e-12, maximum=1e-11)
    with pytest.raises(ValueError, match=r"stem\.conv1: is in training mode"):
        small(attention).fuse()


@pytest.mark.parametrize("attention", ATTENTION_MODES)
def test_checkpointing_changes_nothing(attention):
    """Gradients, and the running statistics, which a repeated forward would move twice."""
    torch.manual_seed(0)
    plain = randomised(small(attention, threshold=1.0))
    recomputed = small(attention, threshold=1.0, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    x = image(128, 128)
    for backbone in (plain, recomputed):
        sum(out.square().sum() for out in backbone.train()(x)).backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert_parity(other.grad, one.grad, rms=1e-6, maximum=1e-5, what=name)
    for (name, one), other in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other), name
    norm = recomputed.stages[0].blocks[0].mlp.ln1.bn
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 1


@needs_torch(2, 6, why="has no Dim.DYNAMIC")
@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_exports_with_dynamic_batch_height_and_width(attention):
    backbone = randomised(small(attention, dict(SMALL, depths=(1, 1, 1)), out_indices=(0, 2))).eval()
    dynamic = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    program = torch.export.export(backbone, (image(128, 192),), dynamic_shapes=(dynamic,))
    for size in ((224, 224), (192, 330)):
        x = image(*size, batch=3)
        for actual, expected in zip(program.module()(x), backbone(x), strict=True):
            assert_parity(actual, expected, rms=1e-6, maximum=1e-5)


def test_padding():
    x = image(100, 70)
    padded = small("linear", pad_input=True).eval()
    explicit = torch.nn.functional.pad(x, (0, 58, 0, 28))
    assert [tuple(m.shape[-2:]) for m in padded(x)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert all(torch.equal(*pair) for pair in zip(padded(x), padded(explicit), strict=True))


def test_frozen_stages():
    backbone = small(frozen_stages=1)
    assert backbone.train() is backbone and backbone.eval() is backbone
    backbone.train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    sum(m.sum() for m in backbone(image(64, 64))).backward()
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith(("stages.1.", "stages.2.")) for name in trained)
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(before[name], value)}
    assert moved and all(name.startswith(("stages.1.", "stages.2.")) for name in moved)
    assert all(p.requires_grad for p in small().parameters())


def test_layer_depth():
    backbone = small()
    depth = lambda name: backbone.get_layer_depth(name, "backbone.")  # noqa: E731
    assert depth("backbone.stem.conv4.bn.weight") == (0, 8)
    assert depth("backbone.stages.0.blocks.1.attn.qkv.linear.weight") == (2, 8)
    assert depth("backbone.stages.1.downsample.mlp.ln1.bn.bias") == (3, 8)
    assert depth("backbone.stages.2.blocks.0.attn.dconv.weight") == (6, 8)
    assert depth("neck.conv.weight") == (7, 8)
    assert {depth(f"backbone.{name}")[0] for name, _ in backbone.named_parameters()} == set(range(7))


def test_builds_from_a_config_of_mmdetection():
    backbone = MODELS.build(dict(type="castling_det.CastlingLeViT", arch="128S", attention="linear"))
    assert isinstance(backbone, CastlingLeViT) and backbone.out_channels == [64, 128, 256, 384]
    assert {attn.mode for _, attn in attention_layers(backbone)} == {"linear"}


@pytest.mark.parametrize(
    ("arch", "published"), [("128S", 305), ("128", 406), ("192", 658), ("256", 1120), ("384", 2353)]
)
def test_cost_at_224_is_the_published_one(arch, published):
    """LeViT's table counts exponentials as well and the classifiers, ours the local convolutions: within 3 percent."""
    found = count_macs(CastlingLeViT(arch, attention="softmax"), image(224, 224, batch=1))
    assert abs(found.macs / (published * 1e6) - 1) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(attention="fast"), r"attention='fast': expected one of"),
        (dict(arch="512"), r"arch='512': expected one of '128S'"),
        (dict(arch=dict(embed_dims=(16,))), r"expected a dict of embed_dims, num_heads, depths, key_dim"),
        (dict(arch=dict(SMALL, depths=(1, 1))), r"expected one number a stage"),
        (dict(arch=dict(SMALL, embed_dims=(12, 24, 32))), r"arch.embed_dims=\(12, 24, 32\).*multiple of 8"),
        (dict(out_indices=(0,)), r"out_indices=\(0,\): expected ascending.*at least 1"),
        (dict(out_indices=(2, 1)), r"out_indices=\(2, 1\)"),
        (dict(out_indices=(4,)), r"out_indices=\(4,\)"),
        (dict(frozen_stages=3, out_indices=(0, 2)), r"frozen_stages=3: expected -1 \(none\) to 2 stages"),
        (dict(img_size=8), r"img_size=8: expected at least 16"),
        (dict(threshold=-1.0), r"threshold=-1.0"),
    ],
)
def test_errors_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_misspelled_option_fails():
    with pytest.raises(TypeError, match="embed_dim"):
        CastlingLeViT(embed_dim=32)
